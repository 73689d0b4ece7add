#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../check.h"
#include "../memory_args.h"
#include "banks.h"
#include "epilogue.h"
#include "memory.h"

namespace coda::cpu {
namespace {

// A memory that is changed in place, and one new token for each of its sequences.
template <class S>
struct Step {
  using T = acc_t<S>;
  MemoryOptions options;
  State state;
  at::Tensor q, k, v, lam, gate, inv_freq, y;
  HeadParameters<T> head;
  int64_t heads, kv_heads, group, dim, groups, window, chunk, exact, summary;
  // Of the state's tensors: asking a tensor for its data in an inner loop takes longer than the loop.
  S *keys, *values;
  T* gates;
  int64_t *positions, *tokens_seen;

  Step(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const std::optional<at::Tensor>& lam_,
       const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate_,
       at::TensorList tensors, const at::Tensor& inv_freq_, const MemoryOptions& memory, const AttentionOptions& attention)
      : options(memory), state(State::from_tensors(tensors)), q(q_.contiguous()), k(k_.contiguous()), v(v_.contiguous()),
        gate(gate_.contiguous()), inv_freq(inv_freq_.contiguous()), y(at::empty(q.sizes(), q.options())),
        head(theta, norm_weight, q_.size(-1), attention.scale, attention.theta_pairs, attention.norm_eps), heads(q.size(1)),
        kv_heads(k.size(1)), group(heads / kv_heads), dim(q.size(2)), groups(state.gate.size(1)), window(memory.window),
        chunk(memory.chunk), exact(state.exact_pos.size(2)), summary(state.summary_mass.size(1)), keys(state.k.template data_ptr<S>()), values(state.v.template data_ptr<S>()),
        gates(state.gate.template data_ptr<T>()), positions(state.exact_pos.template data_ptr<int64_t>()),
        tokens_seen(state.tokens_seen.template data_ptr<int64_t>()) {
    if (lam_) lam = lam_->contiguous();
  }

  int64_t held() const { return window + exact; }
  int64_t group_of(int64_t kv) const { return groups == 1 ? 0 : kv; }
  int64_t position(int64_t n) const { return tokens_seen[n]; }
  S* key(int64_t n, int64_t kv, int64_t slot) const { return keys + ((n * kv_heads + kv) * held() + slot) * dim; }
  S* value(int64_t n, int64_t kv, int64_t slot) const { return values + ((n * kv_heads + kv) * held() + slot) * dim; }
  T& gate_of(int64_t n, int64_t g, int64_t slot) const { return gates[(n * groups + g) * held() + slot]; }
  int64_t& exact_pos(int64_t n, int64_t g, int64_t j) const { return positions[(n * groups + g) * exact + j]; }
  T mass(int64_t n, int64_t j) const { return state.summary_mass.template const_data_ptr<T>()[n * summary + j]; }
};

// --- eviction, where the new token opens a chunk -------------------------------------------------------------------------

template <class S>
struct Eviction {
  using T = acc_t<S>;
  const Step<S>& p;
  int64_t n, begin;  // position of the first evicted token
  int64_t pinned;    // leading ones that are sinks
  int64_t ring0;     // ring slot of the first: the chunk divides the ring, so the others follow

  Eviction(const Step<S>& step, int64_t sequence)
      : p(step), n(sequence), begin(p.position(n) - p.window),
        pinned(std::clamp<int64_t>(p.options.num_sinks - begin, 0, p.chunk)), ring0(p.position(n) % p.window) {}

  bool happens() const { return begin >= 0 && p.position(n) % p.chunk == 0; }
  int64_t ring_slot(int64_t position) const { return ring0 + position - begin; }

  // Copies an evicted token to exact slot j of a gate group.
  void keep(int64_t g, int64_t j, int64_t position) const {
    const int64_t from = ring_slot(position), to = p.window + j;
    const int64_t kv0 = p.groups == 1 ? 0 : g, kv1 = p.groups == 1 ? p.kv_heads : g + 1;
    for (int64_t kv = kv0; kv < kv1; ++kv) {
      if (p.options.bank_distance) {
        turn_back_row(p.key(n, kv, to), p.key(n, kv, from), p.dim, position, p.inv_freq.template const_data_ptr<double>(),
                      p.options.rope_pairs);
      } else {
        std::copy_n(p.key(n, kv, from), p.dim, p.key(n, kv, to));
      }
      std::copy_n(p.value(n, kv, from), p.dim, p.value(n, kv, to));
    }
    p.gate_of(n, g, to) = p.gate_of(n, g, from);
    p.exact_pos(n, g, j) = position;
  }

  std::vector<T> logits() const {
    std::vector<T> z(p.chunk);
    for (int64_t c = 0; c < p.chunk; ++c) z[c] = p.gate_of(n, 0, ring0 + c);
    return z;
  }

  void update_retention() const {
    int64_t* inserts = p.state.counts.template data_ptr<int64_t>() + 2 * n;
    for (int64_t g = 0; g < p.groups; ++g) {
      const auto slot_of = [&](int64_t position, int64_t slot) {
        return RetentionBank::Slot{retention_key(p.gate_of(n, g, slot), p.options.age_decay, position), position, slot};
      };
      RetentionBank bank(p.exact, p.options.num_sinks);
      for (int64_t j = 0; j < p.exact; ++j) {
        if (const int64_t position = p.exact_pos(n, g, j); position >= 0) bank.slots[j] = slot_of(position, p.window + j);
      }
      std::vector<RetentionBank::Slot> offered;
      for (int64_t t = begin; t < begin + p.chunk; ++t) {
        if (t < begin + pinned) {
          bank.pin(t, ring_slot(t));
        } else {
          offered.push_back(slot_of(t, ring_slot(t)));
        }
      }
      *inserts += pinned + bank.offer(offered);
      for (int64_t j = 0; j < p.exact; ++j) {
        if (bank.slots[j].position >= begin) keep(g, j, bank.slots[j].position);
      }
    }
  }

  void update_novelty() const {
    const auto& o = p.options;
    int64_t* counts = p.state.counts.template data_ptr<int64_t>() + 2 * n;
    int64_t* last_touch = p.state.last_touch.template data_ptr<int64_t>() + n * p.exact;
    for (int64_t t = begin; t < begin + pinned; ++t) {
      keep(0, t, t);
      last_touch[t] = t;
    }
    counts[0] += pinned;
    if (p.exact == o.num_sinks) return;
    const auto value_of = [&](int64_t slot) { return [this, slot](int64_t kv) { return p.value(n, kv, slot); }; };
    NoveltyBank<T> bank(p.exact, {o.num_sinks, o.tau_novel, o.tau_match, o.refresh_on_hit});
    for (int64_t j = 0; j < p.exact; ++j) {
      bank.last_touch[j] = last_touch[j];
      bank.used[j] = p.exact_pos(n, 0, j) >= 0;
      if (bank.used[j]) bank.rows[j].load(p.kv_heads, p.dim, value_of(p.window + j));
    }
    Rows<T> candidate;
    for (const int64_t c : highest_gates(logits(), pinned, o.exact_candidates, logit(o.tau_exact))) {
      candidate.load(p.kv_heads, p.dim, value_of(ring0 + c));
      const auto [slot, action] = bank.route(candidate, begin + c);
      ++counts[action == RouteAction::kInsert ? 0 : 1];
      last_touch[slot] = begin + c;
      if (action != RouteAction::kTouch) keep(0, slot, begin + c);
    }
  }

  void update_summaries(const std::vector<T>& stay) const {
    const int64_t size = p.kv_heads * p.summary * p.dim;
    SummaryBank<T> bank{p.options, p.summary, p.kv_heads, p.dim, p.state.summary_k.template data_ptr<T>() + n * size,
                        p.state.summary_v.template data_ptr<T>() + n * size,
                        p.state.summary_mass.template data_ptr<T>() + n * p.summary};
    std::vector<S> turned(p.options.bank_distance ? p.chunk * p.kv_heads * p.dim : 0);
    const auto key = [&](int64_t c, int64_t kv) -> S* {
      return turned.empty() ? p.key(n, kv, ring0 + c) : turned.data() + (c * p.kv_heads + kv) * p.dim;
    };
    for (int64_t item = 0; !turned.empty() && item < p.chunk * p.kv_heads; ++item) {
      const int64_t c = item / p.kv_heads, kv = item % p.kv_heads;
      turn_back_row(key(c, kv), p.key(n, kv, ring0 + c), p.dim, begin + c, p.inv_freq.template const_data_ptr<double>(),
                    p.options.rope_pairs);
    }
    bank.update(logits(), pinned, stay, key, [&](int64_t c, int64_t kv) { return p.value(n, kv, ring0 + c); },
                [](int64_t, int64_t) {});
  }
};

template <class S>
void evict(const Step<S>& p, int64_t n, const std::vector<acc_t<S>>& stay) {
  const Eviction<S> eviction(p, n);
  if (!eviction.happens()) return;
  if (p.summary > 0) eviction.update_summaries(stay);
  if (p.options.policy == Policy::kNoveltyLru) {
    eviction.update_novelty();
  } else {
    eviction.update_retention();
  }
}

// --- attention -----------------------------------------------------------------------------------------------------------

template <class S>
void write_ring(const Step<S>& p, int64_t n) {
  const int64_t slot = p.position(n) % p.window;
  for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
    std::copy_n(p.k.template const_data_ptr<S>() + (n * p.kv_heads + kv) * p.dim, p.dim, p.key(n, kv, slot));
    std::copy_n(p.v.template const_data_ptr<S>() + (n * p.kv_heads + kv) * p.dim, p.dim, p.value(n, kv, slot));
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    p.gate_of(n, g, slot) = p.gate.template const_data_ptr<acc_t<S>>()[n * p.groups + g];
  }
}

// The slots of one sequence and KV head are read in parts. Each part takes the softmax over its own slots, for all query heads and
// both streams, while its keys and values are in the nearest cache; merging the parts ends the step. So threads share the work of
// a single sequence. The size is fixed: the order of a row's sums depends neither on threads nor on the batch.
constexpr int64_t kPart = 64;

// Keys, values and biases of the slots of a part that are seen, in T.
template <class S>
struct PartRows {
  using T = acc_t<S>;
  int64_t dim, count = 0;
  const T *keys[kPart], *values[kPart];
  T bias[kPart];
  std::vector<T> wide;  // where the state is narrower

  explicit PartRows(int64_t dim_) : dim(dim_), wide(std::is_same_v<S, T> ? 0 : 2 * kPart * dim) {}

  template <class Row>
  void see(const Row* key, const Row* value, T slot_bias) {
    keys[count] = in_t(key, 2 * count);
    values[count] = in_t(value, 2 * count + 1);
    bias[count++] = slot_bias;
  }

 private:
  // Asks memory for the row now: the whole part is on its way while the first rows are used.
  const T* in_t(const T* row, int64_t) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < dim; i += line) __builtin_prefetch(row + i);
    return row;
  }
  template <class Row>
  const T* in_t(const Row* row, int64_t place) {
    load_row(wide.data() + place * dim, row, dim);
    return wide.data() + place * dim;
  }
};

// The attention of a step: prepare() for each sequence, then attend() for each part, then finish() for each row of y.
template <class S>
class Attention {
 public:
  using T = acc_t<S>;

  explicit Attention(const Step<S>& step)
      : p_(step), lines_(step.head.streams() * step.group), ring_parts_(at::divup(step.window, kPart)),
        exact_parts_(at::divup(step.exact, kPart)), parts_(ring_parts_ + exact_parts_ + at::divup(step.summary, kPart)),
        query_(2 * units() * lines_ * step.dim), out_(parts() * lines_ * step.dim), peak_(parts() * lines_), total_(parts() * lines_) {}

  int64_t units() const { return p_.q.size(0) * p_.kv_heads; }
  int64_t parts() const { return units() * parts_; }

  // The queries of a sequence: turned towards its ring and towards its banks, for each stream.
  void prepare(int64_t n) {
    const int64_t dim = p_.dim;
    std::vector<T> cos(dim / 2), sin(dim / 2);
    if (p_.options.bank_distance) {
      rope_angles(cos.data(), sin.data(), p_.inv_freq.template const_data_ptr<double>(), dim / 2,
                  *p_.options.bank_distance - chunk_start(n));
    }
    for (int64_t h = 0; h < p_.heads; ++h) {
      const int64_t unit = n * p_.kv_heads + h / p_.group, line = h % p_.group;
      T *ring = queries(unit, false) + line * dim, *bank = queries(unit, true) + line * dim;
      load_row(ring, p_.q.template const_data_ptr<S>() + (n * p_.heads + h) * dim, dim);
      scale_row(ring, dim, p_.head.scale);
      std::copy_n(ring, dim, bank);
      // As prefill does: the turn towards the bank, then R_theta.
      if (p_.options.bank_distance) rotate_row(bank, cos.data(), sin.data(), dim, p_.options.rope_pairs);
      if (!p_.head.two_streams) continue;
      for (T* first : {ring, bank}) {
        T* second = first + p_.group * dim;
        std::copy_n(first, dim, second);
        rotate_row(second, p_.head.cos(h, dim), p_.head.sin(h, dim), dim, p_.head.pairs);
      }
    }
  }

  // One part of all those of all sequences and KV heads.
  void attend(int64_t index) {
    const int64_t unit = index / parts_, part = index % parts_;
    PartRows<S> rows(p_.dim);
    see(rows, unit / p_.kv_heads, unit % p_.kv_heads, part);
    std::vector<T> weight(lines_ * kPart);
    dot_rows(weight.data(), kPart, queries(unit, part >= ring_parts_), lines_, rows.keys, rows.count, p_.dim);
    for (int64_t l = 0; l < lines_; ++l) {
      T *row = weight.data() + l * kPart, &peak = peak_[index * lines_ + l];
      peak = add_bias_and_max(row, rows.bias, rows.count, kNone);
      if (peak != kNone) total_[index * lines_ + l] = exp_and_sum(row, rows.count, peak);
    }
    sum_rows(out_.data() + index * lines_ * p_.dim, lines_, weight.data(), kPart, rows.values, rows.count, p_.dim);
  }

  // One row of y (N, H).
  void finish(int64_t row) {
    const int64_t n = row / p_.heads, h = row % p_.heads, unit = n * p_.kv_heads + h / p_.group, line = h % p_.group;
    std::vector<T> o1(p_.dim), o2(p_.head.two_streams ? p_.dim : 0);
    merge(o1.data(), unit, line);
    if (p_.head.two_streams) merge(o2.data(), unit, p_.group + line);
    finish_row(p_.y.template data_ptr<S>() + row * p_.dim, o1.data(), p_.head.two_streams ? o2.data() : nullptr,
               p_.head.two_streams ? static_cast<T>(p_.lam.template const_data_ptr<S>()[row]) : T(0), p_.head, p_.dim);
  }

 private:
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  int64_t chunk_start(int64_t n) const { return p_.position(n) / p_.chunk * p_.chunk; }
  T* queries(int64_t unit, bool bank) { return query_.data() + (2 * unit + bank) * lines_ * p_.dim; }

  // What the new token sees of a part: ring, exact or summary slots.
  void see(PartRows<S>& rows, int64_t n, int64_t kv, int64_t part) const {
    if (part < ring_parts_) {
      const int64_t newest = p_.position(n) % p_.window;
      const int64_t oldest = std::max<int64_t>(0, chunk_start(n) - (p_.window - p_.chunk));
      for (int64_t slot = part * kPart; slot < std::min(p_.window, (part + 1) * kPart); ++slot) {
        const int64_t age = newest - slot + (slot > newest ? p_.window : 0);
        if (p_.position(n) - age >= oldest) rows.see(p_.key(n, kv, slot), p_.value(n, kv, slot), T(0));
      }
    } else if (part < ring_parts_ + exact_parts_) {
      const int64_t g = p_.group_of(kv), first = (part - ring_parts_) * kPart;
      for (int64_t j = first; j < std::min(p_.exact, first + kPart); ++j) {
        if (p_.exact_pos(n, g, j) < 0) continue;
        const int64_t slot = p_.window + j;
        const bool biased = p_.options.gate_bias && j >= p_.options.num_sinks;
        rows.see(p_.key(n, kv, slot), p_.value(n, kv, slot), biased ? log_sigmoid(p_.gate_of(n, g, slot)) : T(0));
      }
    } else {
      const T *keys = p_.state.summary_k.template const_data_ptr<T>(), *values = p_.state.summary_v.template const_data_ptr<T>();
      const int64_t first = (part - ring_parts_ - exact_parts_) * kPart;
      for (int64_t j = first; j < std::min(p_.summary, first + kPart); ++j) {
        const T mass = p_.mass(n, j);
        if (!(mass > T(0))) continue;
        const int64_t row = ((n * p_.kv_heads + kv) * p_.summary + j) * p_.dim;
        rows.see(keys + row, values + row, p_.options.mass_bias ? std::log(mass) : T(0));
      }
    }
  }

  // A query line over all slots, into out (D): 0 where no slot gave it a key to attend to.
  void merge(T* out, int64_t unit, int64_t line) const {
    const auto at = [&](int64_t part) { return (unit * parts_ + part) * lines_ + line; };
    T peak = kNone, total = 0;
    for (int64_t part = 0; part < parts_; ++part) peak = std::max(peak, peak_[at(part)]);
    for (int64_t part = 0; part < parts_; ++part) {
      if (peak_[at(part)] == kNone) continue;
      const T factor = std::exp(peak_[at(part)] - peak);
      total += factor * total_[at(part)];
      axpy_row(out, out_.data() + at(part) * p_.dim, p_.dim, factor);
    }
    if (peak != kNone) scale_row(out, p_.dim, T(1) / total);
  }

  const Step<S>& p_;
  int64_t lines_;                              // of one KV head: its query heads, once for each stream
  int64_t ring_parts_, exact_parts_, parts_;   // of one KV head of one sequence
  std::vector<T> query_;                       // (N, Hkv, 2, lines, D), scaled: towards the ring, towards the banks
  std::vector<T> out_, peak_, total_;          // (N, Hkv, parts, lines, D) and twice (N, Hkv, parts, lines), not yet normalised
};

at::Tensor decode_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                        const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                        const at::Tensor& gate, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
                        const at::Tensor& inv_freq, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  const MemoryOptions memory = CODA_MEMORY_OPTIONS;
  check_decode_step(q, k, v, lam, theta, norm_weight, gate, state, eta_logit, inv_freq, memory);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "coda::decode_step_", [&] {
    const Step<scalar_t> p(q, k, v, lam, theta, norm_weight, gate, state, inv_freq, memory, CODA_ATTENTION_OPTIONS);
    const auto stay = staying_rates<acc_t<scalar_t>>(eta_logit);
    const int64_t sequences = p.q.size(0);
    Attention<scalar_t> attention(p);
    const auto each = [](int64_t count, int64_t grain, const auto& work) {
      at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(i);
      });
    };
    each(sequences, 1, [&](int64_t n) {
      evict(p, n, stay);
      write_ring(p, n);
      attention.prepare(n);
    });
    each(attention.parts(), 1, [&](int64_t part) { attention.attend(part); });
    each(sequences * p.heads, 64, [&](int64_t row) { attention.finish(row); });
    for (int64_t n = 0; n < sequences; ++n) ++p.tokens_seen[n];
    return p.y;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) { m.impl("decode_step_", decode_step_); }

}  // namespace coda::cpu
