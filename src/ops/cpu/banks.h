#pragma once

// The rules by which tokens enter the banks, one chunk of evicted tokens at a time: what bank_scan, decode_step_ and
// route_exact_bank share on the CPU. Sums that decide run in the fixed order of fixed_order_dot, as on every device.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <coda/options.h>
#include <coda/ops/route_exact_bank.h>

#include "../host.h"
#include "tile_attention.h"
#include "vector_math.h"

namespace coda::cpu {

template <class T>
T sigmoid(T z) {
  return T(1) / (T(1) + std::exp(-z));
}

// log(sigmoid(z)) without overflow for either sign.
template <class T>
T log_sigmoid(T z) {
  return std::min(z, T(0)) - std::log1p(std::exp(-std::abs(z)));
}

// z + rho * p, the product rounded before the sum, so that every device orders alike (semantics 3.3). NaN ranks last.
inline double retention_key(double z, double age_decay, int64_t position) {
  const double key = z + age_decay * static_cast<double>(position);
  return std::isnan(key) ? -std::numeric_limits<double>::infinity() : key;
}

// The exact bank of one gate group under the retention policy: a running top-k. A token stays in its slot for as long as it stays.
struct RetentionBank {
  struct Slot {
    double key;
    int64_t position;  // -1 free
    int64_t source;
  };
  std::vector<Slot> slots;
  int64_t sinks;

  RetentionBank(int64_t size, int64_t num_sinks) : slots(size, {0.0, -1, -1}), sinks(num_sinks) {}

  void pin(int64_t position, int64_t source) { slots[position] = {0.0, position, source}; }

  // Offers tokens in position order; the best stay. Returns how many came in.
  int64_t offer(const std::vector<Slot>& tokens) {
    const auto better = [](const Slot* a, const Slot* b) {
      return a->key > b->key || (a->key == b->key && a->position > b->position);
    };
    std::vector<const Slot*> pool;
    for (size_t j = sinks; j < slots.size(); ++j) {
      if (slots[j].position >= 0) pool.push_back(&slots[j]);
    }
    for (const auto& token : tokens) pool.push_back(&token);
    const size_t capacity = slots.size() - sinks;
    if (pool.size() > capacity) {
      std::nth_element(pool.begin(), pool.begin() + capacity, pool.end(), better);
      for (size_t i = capacity; i < pool.size(); ++i) dropped_.push_back(pool[i]->position);
    }
    const auto stays = [&](const Slot& token) {
      return std::find(dropped_.begin(), dropped_.end(), token.position) == dropped_.end();
    };
    for (size_t j = sinks; j < slots.size(); ++j) {
      if (slots[j].position >= 0 && !stays(slots[j])) slots[j].position = -1;
    }
    int64_t inserted = 0;
    size_t free = sinks;
    for (const auto& token : tokens) {
      if (!stays(token)) continue;
      while (slots[free].position >= 0) ++free;
      slots[free] = token;
      ++inserted;
    }
    dropped_.clear();
    return inserted;
  }

 private:
  std::vector<int64_t> dropped_;
};

// (heads, D) rows widened to T, with their norms clamped at 1e-6.
template <class T>
struct Rows {
  std::vector<T> value, norm;

  // value(head) is a row of D elements; elements d with !keep(d) count as 0.
  template <class Value, class Keep>
  void load(int64_t heads, int64_t dim, Value row, Keep keep) {
    value.resize(heads * dim);
    norm.resize(heads);
    for (int64_t h = 0; h < heads; ++h) {
      T* to = value.data() + h * dim;
      load_row(to, row(h), dim);
      for (int64_t d = 0; d < dim; ++d) {
        if (!keep(d)) to[d] = T(0);
      }
      norm[h] = std::max(std::sqrt(fixed_order_dot(to, to, dim)), T(1e-6));
    }
  }
  template <class Value>
  void load(int64_t heads, int64_t dim, Value row) {
    load(heads, dim, row, [](int64_t) { return true; });
  }
};

// Mean over heads of the cosine.
template <class T>
T mean_cosine(const Rows<T>& a, const Rows<T>& b) {
  const int64_t heads = a.norm.size(), dim = a.value.size() / heads;
  T total = 0;
  for (int64_t h = 0; h < heads; ++h) {
    total += fixed_order_dot(a.value.data() + h * dim, b.value.data() + h * dim, dim) / (a.norm[h] * b.norm[h]);
  }
  return total / static_cast<T>(heads);
}

// Whether a similarity is above the best of the slots before it. NaN ranks below every number.
template <class T>
bool beats(T here, T best) {
  return here > best || (best != best && here == here);
}

struct NoveltyRule {
  int64_t sinks;
  double tau_novel, tau_match;
  bool refresh_on_hit;
};

// The exact bank under novelty_lru (semantics 3.4).
template <class T>
struct NoveltyBank {
  NoveltyRule rule;
  std::vector<Rows<T>> rows;  // per slot, of the values held
  std::vector<char> used;
  std::vector<int64_t> last_touch;

  NoveltyBank(int64_t slots, const NoveltyRule& rule_) : rule(rule_), rows(slots), used(slots, 0), last_touch(slots, 0) {}

  struct Decision {
    int64_t slot;
    RouteAction action;
  };
  // Routes the next candidate and takes it in where it is new or refreshes its match.
  Decision route(const Rows<T>& candidate, int64_t position) {
    const int64_t slots = used.size();
    int64_t best = -1;
    T score = 0;
    for (int64_t j = 0; j < slots; ++j) {
      if (!used[j]) continue;
      const T here = mean_cosine(candidate, rows[j]);
      if (best < 0 || beats(here, score)) {
        best = j;
        score = here;
      }
    }
    Decision decision{best, RouteAction::kTouch};
    if (best < 0 || static_cast<double>(score) < rule.tau_novel) {
      // Free slots count as touched before anything else, the lowest first.
      const auto touched = [&](int64_t j) { return used[j] ? last_touch[j] : std::numeric_limits<int64_t>::min(); };
      decision = {rule.sinks, RouteAction::kInsert};
      for (int64_t j = rule.sinks; j < slots; ++j) {
        if (touched(j) < touched(decision.slot)) decision.slot = j;
      }
    } else if (rule.refresh_on_hit && static_cast<double>(score) >= rule.tau_match && best >= rule.sinks) {
      decision.action = RouteAction::kRefresh;
    }
    if (decision.action != RouteAction::kTouch) {
      rows[decision.slot] = candidate;
      used[decision.slot] = 1;
    }
    last_touch[decision.slot] = position;
    return decision;
  }
};

// Offsets of the `count` highest gate logits among those of at least `threshold`, from offset `skip` on; ties to the earlier one;
// ascending.
template <class T>
std::vector<int64_t> highest_gates(const std::vector<T>& logits, int64_t skip, int64_t count, double threshold) {
  std::vector<int64_t> kept;
  for (int64_t c = skip; c < static_cast<int64_t>(logits.size()); ++c) {
    if (static_cast<double>(logits[c]) >= threshold) kept.push_back(c);
  }
  std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  if (static_cast<int64_t>(kept.size()) > count) kept.resize(count);
  std::sort(kept.begin(), kept.end());
  return kept;
}

// Whether dimension d belongs to the slower half of the RoPE pairs.
inline bool is_slow(int64_t d, int64_t dim, Pairs pairs) {
  return (pairs == Pairs::kInterleaved ? d / 2 : d % (dim / 2)) >= dim / 4;
}

// What dimension d of a key counts for in a summary (semantics 3.5).
template <class T>
T key_factor(const MemoryOptions& options, int64_t d, int64_t dim) {
  if (options.summary_routing != SummaryRouting::kLowFreqKey) return T(1);
  const int64_t slow = 2 * (dim / 2 - dim / 4);
  return is_slow(d, dim, options.rope_pairs) ? std::sqrt(static_cast<T>(dim) / static_cast<T>(slow)) : T(0);
}

// The summary bank of one sequence (semantics 3.5). The slots' k, v (Hkv, Ms, D) and mass (Ms) are the caller's, updated in place.
template <class T>
struct SummaryBank {
  const MemoryOptions& options;
  int64_t slots, heads, dim;
  T *k, *v, *mass;

  T* row(T* rows, int64_t head, int64_t slot) const { return rows + (head * slots + slot) * dim; }

  // One chunk: evicted tokens [skip, logits.size()), key(c, h) as a bank holds it and value(c, h). stay (Hkv) is 1 - eta. assign(c,
  // slot) is told of every token that went to a slot.
  template <class Key, class Value, class Assign>
  void update(const std::vector<T>& logits, int64_t skip, const std::vector<T>& stay, Key key, Value value, Assign assign) {
    const bool by_key = options.summary_routing == SummaryRouting::kLowFreqKey;
    const double threshold = logit(options.tau_summary);
    const auto keep = [&](int64_t d) { return !by_key || is_slow(d, dim, options.rope_pairs); };
    std::vector<Rows<T>> feature(slots);
    std::vector<char> scored(slots, 0);  // held before this chunk, or claimed in it
    for (int64_t j = 0; j < slots; ++j) {
      if (!(mass[j] > T(0))) continue;
      feature[j].load(heads, dim, [&](int64_t h) { return row(by_key ? k : v, h, j); }, keep);
      scored[j] = 1;
    }
    std::vector<std::vector<int64_t>> members(slots);
    Rows<T> mine;
    for (int64_t c = skip; c < static_cast<int64_t>(logits.size()); ++c) {
      if (!(static_cast<double>(logits[c]) >= threshold)) continue;
      if (by_key) {
        mine.load(heads, dim, [&](int64_t h) { return key(c, h); }, keep);
      } else {
        mine.load(heads, dim, [&](int64_t h) { return value(c, h); });
      }
      int64_t best = -1, free = -1;
      T score = 0;
      for (int64_t j = 0; j < slots; ++j) {
        if (!scored[j]) {
          if (free < 0) free = j;
          continue;
        }
        const T here = mean_cosine(mine, feature[j]);
        if (best < 0 || beats(here, score)) {
          best = j;
          score = here;
        }
      }
      if (free >= 0 && (best < 0 || static_cast<double>(score) < options.tau_spawn)) {
        best = free;
        feature[best] = mine;
        scored[best] = 1;
      }
      members[best].push_back(c);
      assign(c, best);
    }
    std::vector<T> mean_k(dim), mean_v(dim);
    for (int64_t j = 0; j < slots; ++j) {
      if (members[j].empty()) continue;
      T gates = 0;
      for (const int64_t c : members[j]) gates += sigmoid(logits[c]);
      const bool held = mass[j] > T(0);
      for (int64_t h = 0; h < heads; ++h) {
        std::fill(mean_k.begin(), mean_k.end(), T(0));
        std::fill(mean_v.begin(), mean_v.end(), T(0));
        for (const int64_t c : members[j]) {
          const auto *from_k = key(c, h), *from_v = value(c, h);
          const T gate = sigmoid(logits[c]);
          for (int64_t d = 0; d < dim; ++d) {
            mean_k[d] += gate * static_cast<T>(from_k[d]);
            mean_v[d] += gate * static_cast<T>(from_v[d]);
          }
        }
        for (int64_t d = 0; d < dim; ++d) {
          mean_k[d] *= key_factor<T>(options, d, dim) / gates;
          mean_v[d] /= gates;
        }
        const T rate = held ? T(1) - std::pow(stay[h], gates) : T(1);
        T *to_k = row(k, h, j), *to_v = row(v, h, j);
        for (int64_t d = 0; d < dim; ++d) {
          to_k[d] = held ? to_k[d] + rate * (mean_k[d] - to_k[d]) : mean_k[d];
          to_v[d] = held ? to_v[d] + rate * (mean_v[d] - to_v[d]) : mean_v[d];
        }
      }
      mass[j] += gates;
    }
  }
};

// 1 - eta per KV head.
template <class T>
std::vector<T> staying_rates(const std::optional<at::Tensor>& eta_logit) {
  if (!eta_logit) return {};
  const at::Tensor wide = eta_logit->detach().to(type_of<T>()).contiguous();
  std::vector<T> stay(wide.numel());
  std::transform(wide.const_data_ptr<T>(), wide.const_data_ptr<T>() + stay.size(), stay.begin(), [](T z) { return sigmoid(-z); });
  return stay;
}

}  // namespace coda::cpu
