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
void write_ring(const Step<S>& p, int64_t n, int64_t kv) {
  const int64_t slot = p.position(n) % p.window;
  std::copy_n(p.k.template const_data_ptr<S>() + (n * p.kv_heads + kv) * p.dim, p.dim, p.key(n, kv, slot));
  std::copy_n(p.v.template const_data_ptr<S>() + (n * p.kv_heads + kv) * p.dim, p.dim, p.value(n, kv, slot));
  if (kv < p.groups) p.gate_of(n, kv, slot) = p.gate.template const_data_ptr<acc_t<S>>()[n * p.groups + kv];
}

// A row of the state in T: itself, or widened into `buffer`.
template <class T>
const T* widened(const T* row, int64_t, T*) {
  return row;
}
template <class T, class S>
const T* widened(const S* row, int64_t dim, T* buffer) {
  load_row(buffer, row, dim);
  return buffer;
}

// One stream of all query heads of one KV head of one sequence, into out (G, D). Few rows meet many slots, each once, so this
// goes over the slots in place: packing them for a GEMM would cost as much as the products.
template <class S>
void attend(const Step<S>& p, int64_t n, int64_t kv, bool second, acc_t<S>* out) {
  using T = acc_t<S>;
  constexpr T none = -std::numeric_limits<T>::infinity();
  const int64_t dim = p.dim, lines = p.group;
  const int64_t position = p.position(n), start = position / p.chunk * p.chunk;
  const int64_t window_begin = std::max<int64_t>(0, start - (p.window - p.chunk));
  const auto head_of = [&](int64_t r) { return kv * p.group + r; };

  std::vector<T> ring_q(lines * dim), bank_q, cos(dim / 2), sin(dim / 2);
  if (p.options.bank_distance) {
    bank_q.resize(lines * dim);
    rope_angles(cos.data(), sin.data(), p.inv_freq.template const_data_ptr<double>(), dim / 2, *p.options.bank_distance - start);
  }
  for (int64_t r = 0; r < p.group; ++r) {
    T* row = ring_q.data() + r * dim;
    load_row(row, p.q.template const_data_ptr<S>() + (n * p.heads + head_of(r)) * dim, dim);
    scale_row(row, dim, p.head.scale);
    const auto turn_second = [&](T* query) {
      if (second) rotate_row(query, p.head.cos(head_of(r), dim), p.head.sin(head_of(r), dim), dim, p.head.pairs);
    };
    if (!bank_q.empty()) {
      T* towards_bank = bank_q.data() + r * dim;
      std::copy_n(row, dim, towards_bank);
      rotate_row(towards_bank, cos.data(), sin.data(), dim, p.options.rope_pairs);
      turn_second(towards_bank);
    }
    turn_second(row);
  }

  // Slots in use, and their biases.
  std::vector<int64_t> seen;
  std::vector<T> bias;
  const auto see = [&](int64_t slot, T slot_bias) {
    seen.push_back(slot);
    bias.push_back(slot_bias);
  };
  for (int64_t t = window_begin; t <= position; ++t) see(t % p.window, T(0));
  const size_t ring_slots = seen.size();
  const int64_t g = p.group_of(kv);
  for (int64_t j = 0; j < p.exact; ++j) {
    if (p.exact_pos(n, g, j) < 0) continue;
    const bool biased = p.options.gate_bias && j >= p.options.num_sinks;
    see(p.window + j, biased ? log_sigmoid(p.gate_of(n, g, p.window + j)) : T(0));
  }
  for (int64_t j = 0; j < p.summary; ++j) {
    if (p.mass(n, j) > T(0)) see(p.held() + j, p.options.mass_bias ? std::log(p.mass(n, j)) : T(0));
  }

  std::vector<T> buffer(dim), weight(lines * seen.size());
  const auto row_of = [&](int64_t slot, const S* rows, const at::Tensor& summaries) -> const T* {
    if (slot >= p.held()) {
      return summaries.const_data_ptr<T>() + ((n * p.kv_heads + kv) * p.summary + slot - p.held()) * dim;
    }
    return widened<T>(rows + slot * dim, dim, buffer.data());
  };
  for (size_t i = 0; i < seen.size(); ++i) {
    const T* key = row_of(seen[i], p.key(n, kv, 0), p.state.summary_k);
    const T* query = i < ring_slots || bank_q.empty() ? ring_q.data() : bank_q.data();
    dot_lines(weight.data() + i, seen.size(), query, lines, key, dim);
  }
  std::fill_n(out, lines * dim, T(0));
  for (int64_t l = 0; l < lines; ++l) {
    T* row = weight.data() + l * seen.size();
    const T peak = add_bias_and_max(row, bias.data(), seen.size(), none);
    // A row whose every logit is -inf has no key to attend to.
    if (peak == none) {
      std::fill_n(row, seen.size(), T(0));
    } else {
      scale_row(row, seen.size(), T(1) / exp_and_sum(row, seen.size(), peak));
    }
  }
  for (size_t i = 0; i < seen.size(); ++i) {
    const T* value = row_of(seen[i], p.value(n, kv, 0), p.state.summary_v);
    add_to_lines(out, lines, weight.data() + i, seen.size(), value, dim);
  }
}

// y from the streams (streams, N, H, D).
template <class S>
void finish(const Step<S>& p, acc_t<S>* out) {
  using T = acc_t<S>;
  const int64_t rows = p.q.size(0) * p.heads;
  for (int64_t r = 0; r < rows; ++r) {
    const T lam = p.head.two_streams ? static_cast<T>(p.lam.template const_data_ptr<S>()[r]) : T(0);
    finish_row(p.y.template data_ptr<S>() + r * p.dim, out + r * p.dim, p.head.two_streams ? out + (rows + r) * p.dim : nullptr, lam,
               p.head, p.dim);
  }
}

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
    const int64_t units = sequences * p.kv_heads;
    for (int64_t n = 0; n < sequences; ++n) evict(p, n, stay);
    for (int64_t unit = 0; unit < units; ++unit) write_ring(p, unit / p.kv_heads, unit % p.kv_heads);
    std::vector<acc_t<scalar_t>> out(p.head.streams() * units * p.group * p.dim);
    at::parallel_for(0, p.head.streams() * units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i % units;
        attend(p, unit / p.kv_heads, unit % p.kv_heads, i >= units, out.data() + i * p.group * p.dim);
      }
    });
    finish(p, out.data());
    for (int64_t n = 0; n < sequences; ++n) ++p.tokens_seen[n];
    return p.y;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) { m.impl("decode_step_", decode_step_); }

}  // namespace coda::cpu
