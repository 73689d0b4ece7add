#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "../memory_args.h"
#include "banks.h"
#include "memory.h"

namespace coda::cpu {
namespace {

// What a scan writes.
template <class S>
struct Scan {
  using T = acc_t<S>;
  at::Tensor index, source, assignment;            // (NC, R, Me), (N, R, Me), (NC, C) or (NC, 0)
  at::Tensor summary_k, summary_v, summary_mass;   // (NC, Hkv, Ms, D) twice, (NC, Ms)
  State made;

  explicit Scan(const Memory<S>& m) {
    const at::TensorOptions int32 = m.k.options().dtype(at::kInt);
    index = at::full({m.rows, m.groups, m.exact}, -1, int32);
    source = at::full({m.sequences, m.groups, m.exact}, -1, int32);
    assignment = at::full({m.rows, m.summary > 0 ? m.chunk : 0}, -1, int32);
    summary_k = at::zeros({m.rows, m.kv_heads, m.summary, m.dim}, m.state.summary_k.options());
    summary_v = at::zeros_like(summary_k);
    summary_mass = at::zeros({m.rows, m.summary}, m.state.summary_mass.options());
    std::vector<at::Tensor> tensors;
    for (const at::Tensor& t : m.state.tensors()) tensors.push_back(t.detach().clone());
    made = State::from_tensors(tensors);
  }
};

template <class S>
std::vector<acc_t<S>> evicted_gates(const Sequence<S>& s, int64_t start) {
  std::vector<acc_t<S>> logits(s.m.chunk);
  for (int64_t c = 0; c < s.m.chunk; ++c) logits[c] = s.gate(s.source_of(start - s.m.window + c), 0);
  return logits;
}

// Returns how many tokens came in.
template <class S>
int64_t scan_retention(const Scan<S>& out, const Sequence<S>& s, int64_t group) {
  const Memory<S>& m = s.m;
  const int64_t bank_row = (s.n * m.groups + group) * m.exact;
  const int64_t* held = m.state.exact_pos.template const_data_ptr<int64_t>() + bank_row;
  RetentionBank bank(m.exact, m.options.num_sinks);
  const auto slot_of = [&](int64_t position, int64_t source) {
    return RetentionBank::Slot{retention_key(s.gate(source, group), m.options.age_decay, position), position, source};
  };
  for (int64_t j = 0; j < m.exact; ++j) {
    if (held[j] >= 0) bank.slots[j] = slot_of(held[j], m.window + j);
  }
  int64_t inserted = 0;
  std::vector<RetentionBank::Slot> offered;
  for (int64_t i = 0; i < s.chunks; ++i) {
    const int64_t start = s.chunk_start(i);
    if (s.evicts(start)) {
      const int64_t evicted = start - m.window, pinned = s.sinks_at(start);
      offered.clear();
      for (int64_t p = evicted; p < evicted + m.chunk; ++p) {
        if (p < evicted + pinned) {
          bank.pin(p, s.source_of(p));
        } else {
          offered.push_back(slot_of(p, s.source_of(p)));
        }
      }
      inserted += pinned + bank.offer(offered);
    }
    int32_t* index = out.index.template data_ptr<int32_t>() + ((s.row0 + i) * m.groups + group) * m.exact;
    for (int64_t j = 0; j < m.exact; ++j) {
      if (bank.slots[j].position >= 0) index[j] = static_cast<int32_t>(bank.slots[j].source);
    }
  }
  for (int64_t j = 0; j < m.exact; ++j) {
    const auto& slot = bank.slots[j];
    out.made.exact_pos.template data_ptr<int64_t>()[bank_row + j] = slot.position;
    if (slot.position >= 0) out.source.template data_ptr<int32_t>()[bank_row + j] = static_cast<int32_t>(slot.source);
  }
  return inserted;
}

template <class S>
void scan_novelty(const Scan<S>& out, const Sequence<S>& s) {
  using T = acc_t<S>;
  const Memory<S>& m = s.m;
  const auto& o = m.options;
  NoveltyBank<T> bank(m.exact, {o.num_sinks, o.tau_novel, o.tau_match, o.refresh_on_hit});
  std::vector<int64_t> source(m.exact);
  int64_t* position = out.made.exact_pos.template data_ptr<int64_t>() + s.n * m.exact;
  int64_t* last_touch = out.made.last_touch.template data_ptr<int64_t>() + s.n * m.exact;
  const auto value_of = [&](int64_t from) { return [&s, from](int64_t h) { return s.value(from, h); }; };
  for (int64_t j = 0; j < m.exact; ++j) {
    source[j] = m.window + j;
    bank.last_touch[j] = last_touch[j];
    bank.used[j] = position[j] >= 0;
    if (bank.used[j]) bank.rows[j].load(m.kv_heads, m.dim, value_of(source[j]));
  }
  int64_t inserts = 0, hits = 0;
  Rows<T> candidate;
  for (int64_t i = 0; i < s.chunks; ++i) {
    const int64_t start = s.chunk_start(i);
    if (s.evicts(start)) {
      const int64_t evicted = start - m.window, pinned = s.sinks_at(start);
      for (int64_t p = evicted; p < evicted + pinned; ++p) {
        bank.rows[p].load(m.kv_heads, m.dim, value_of(s.source_of(p)));
        bank.used[p] = 1;
        bank.last_touch[p] = position[p] = p;
        source[p] = s.source_of(p);
      }
      inserts += pinned;
      if (m.exact > o.num_sinks) {
        for (const int64_t c : highest_gates(evicted_gates(s, start), pinned, o.exact_candidates, logit(o.tau_exact))) {
          const int64_t p = evicted + c;
          candidate.load(m.kv_heads, m.dim, value_of(s.source_of(p)));
          const auto [slot, action] = bank.route(candidate, p);
          ++(action == RouteAction::kInsert ? inserts : hits);
          if (action == RouteAction::kTouch) continue;
          position[slot] = p;
          source[slot] = s.source_of(p);
        }
      }
    }
    int32_t* index = out.index.template data_ptr<int32_t>() + (s.row0 + i) * m.exact;
    for (int64_t j = 0; j < m.exact; ++j) {
      if (bank.used[j]) index[j] = static_cast<int32_t>(source[j]);
    }
  }
  for (int64_t j = 0; j < m.exact; ++j) {
    last_touch[j] = bank.last_touch[j];
    if (bank.used[j]) out.source.template data_ptr<int32_t>()[s.n * m.exact + j] = static_cast<int32_t>(source[j]);
  }
  out.made.counts.template data_ptr<int64_t>()[2 * s.n] += inserts;
  out.made.counts.template data_ptr<int64_t>()[2 * s.n + 1] += hits;
}

template <class S>
void scan_summaries(const Scan<S>& out, const Sequence<S>& s, const std::vector<acc_t<S>>& stay) {
  using T = acc_t<S>;
  const Memory<S>& m = s.m;
  const int64_t size = m.kv_heads * m.summary * m.dim;
  SummaryBank<T> bank{m.options, m.summary, m.kv_heads, m.dim, out.made.summary_k.template data_ptr<T>() + s.n * size,
                      out.made.summary_v.template data_ptr<T>() + s.n * size,
                      out.made.summary_mass.template data_ptr<T>() + s.n * m.summary};
  std::vector<S> turned(m.chunk * m.kv_heads * m.dim);
  const auto key = [&](int64_t c, int64_t h) { return turned.data() + (c * m.kv_heads + h) * m.dim; };
  for (int64_t i = 0; i < s.chunks; ++i) {
    const int64_t start = s.chunk_start(i), row = s.row0 + i;
    if (s.evicts(start)) {
      const int64_t evicted = start - m.window;
      for (int64_t c = 0; c < m.chunk; ++c) {
        for (int64_t h = 0; h < m.kv_heads; ++h) s.bank_key(key(c, h), s.source_of(evicted + c), h);
      }
      bank.update(
          evicted_gates(s, start), s.sinks_at(start), stay, key,
          [&](int64_t c, int64_t h) { return s.value(s.source_of(evicted + c), h); },
          [&](int64_t c, int64_t slot) {
            out.assignment.template data_ptr<int32_t>()[row * m.chunk + c] = static_cast<int32_t>(slot);
          });
    }
    for (int64_t item = 0; item < m.kv_heads * m.summary; ++item) {
      if (!(bank.mass[item % m.summary] > T(0))) continue;
      std::copy_n(bank.k + item * m.dim, m.dim, out.summary_k.template data_ptr<T>() + row * size + item * m.dim);
      std::copy_n(bank.v + item * m.dim, m.dim, out.summary_v.template data_ptr<T>() + row * size + item * m.dim);
    }
    std::copy_n(bank.mass, m.summary, out.summary_mass.template data_ptr<T>() + row * m.summary);
  }
}

// Ring and exact slots of one KV head after the new tokens. Slots that nothing came into keep what they hold.
template <class S>
void copy_slots(const Scan<S>& out, const Sequence<S>& s, int64_t head) {
  using T = acc_t<S>;
  const Memory<S>& m = s.m;
  const int64_t group = m.group_of(head);
  const int32_t* chosen = out.source.template const_data_ptr<int32_t>() + (s.n * m.groups + group) * m.exact;
  for (int64_t slot = 0; slot < m.held(); ++slot) {
    int64_t source = slot;
    if (slot >= m.window) {
      if (chosen[slot - m.window] >= 0) source = chosen[slot - m.window];
    } else if (const int64_t position = s.ring_position(s.end(), slot); position >= s.first) {
      source = s.source_of(position);
    }
    if (source == slot) continue;
    const int64_t to = s.state_row(slot, head);
    S* k = out.made.k.template data_ptr<S>() + to * m.dim;
    if (slot >= m.window) {
      s.bank_key(k, source, head);
    } else {
      std::copy_n(s.key(source, head), m.dim, k);
    }
    std::copy_n(s.value(source, head), m.dim, out.made.v.template data_ptr<S>() + to * m.dim);
    if (head == group) {
      out.made.gate.template data_ptr<T>()[(s.n * m.groups + group) * m.held() + slot] = s.gate(source, group);
    }
  }
}

template <class S>
Scan<S> scan(const Memory<S>& m, const std::optional<at::Tensor>& eta_logit) {
  Scan<S> out(m);
  const auto stay = staying_rates<acc_t<S>>(eta_logit);
  at::parallel_for(0, m.sequences, 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode no_autograd;
    for (int64_t n = begin; n < end; ++n) {
      const Sequence<S> s(m, n);
      if (m.options.policy == Policy::kNoveltyLru) {
        scan_novelty(out, s);
      } else {
        for (int64_t group = 0; group < m.groups; ++group) {
          out.made.counts.template data_ptr<int64_t>()[2 * n] += scan_retention(out, s, group);
        }
      }
      if (m.summary > 0) scan_summaries(out, s, stay);
      for (int64_t head = 0; head < m.kv_heads; ++head) copy_slots(out, s, head);
      out.made.tokens_seen.template data_ptr<int64_t>()[n] += s.length;
    }
  });
  return out;
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>;

Forward bank_scan_forward(const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens,
                          at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                          CODA_MEMORY_PARAMS) {
  const MemoryOptions options = CODA_MEMORY_OPTIONS;
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "coda::bank_scan", [&]() -> Forward {
    const auto out = scan(Memory<scalar_t>(k, v, gate, cu_seqlens, state, inv_freq, options), eta_logit);
    return {out.index, out.summary_k, out.summary_v, out.summary_mass, out.made.tensors(), out.source, out.assignment};
  });
}

// --- backward -----------------------------------------------------------------------------------------------------------

// Gradients of what the scan reads, in the accumulation type, since several paths meet in one token.
template <class T>
struct Gradients {
  at::Tensor k, v, gate, state_k, state_v, state_gate, summary_k, summary_v, summary_mass, eta;
};

template <class S>
struct Backward {
  using T = acc_t<S>;
  const Memory<S>& m;
  Gradients<T> to;

  explicit Backward(const Memory<S>& memory) : m(memory) {
    const at::TensorOptions wide = m.k.options().dtype(type_of<T>());
    to = {at::zeros(m.k.sizes(), wide),         at::zeros(m.v.sizes(), wide),         at::zeros(m.gate.sizes(), wide),
          at::zeros(m.state.k.sizes(), wide),   at::zeros(m.state.v.sizes(), wide),   at::zeros(m.state.gate.sizes(), wide),
          at::empty(m.state.summary_k.sizes(), wide), at::empty(m.state.summary_v.sizes(), wide),
          at::empty(m.state.summary_mass.sizes(), wide), at::zeros({m.sequences, m.kv_heads}, wide)};
  }

  T* key(const Sequence<S>& s, int64_t source, int64_t head) const {
    return s.row(to.state_k.template data_ptr<T>(), to.k.template data_ptr<T>(), source, head, m.dim);
  }
  T* value(const Sequence<S>& s, int64_t source, int64_t head) const {
    return s.row(to.state_v.template data_ptr<T>(), to.v.template data_ptr<T>(), source, head, m.dim);
  }
  T* gate(const Sequence<S>& s, int64_t source, int64_t group) const {
    return source < m.held() ? to.state_gate.template data_ptr<T>() + (s.n * m.groups + group) * m.held() + source
                             : to.gate.template data_ptr<T>() + (s.token0 + source - m.held()) * m.groups + group;
  }
  void add_key(const Sequence<S>& s, int64_t source, int64_t head, std::vector<T>& bank_grad) const {
    s.bank_key_backward(bank_grad.data(), source);
    axpy_row(key(s, source, head), bank_grad.data(), m.dim, T(1));
  }

  // The new state's ring and exact slots give back to what they are copies of.
  void copies(const Sequence<S>& s, int64_t head, const at::Tensor& grad_k, const at::Tensor& grad_v, const at::Tensor& grad_gate,
              const at::Tensor& chosen) const {
    const int64_t group = m.group_of(head);
    const int32_t* from = chosen.const_data_ptr<int32_t>() + (s.n * m.groups + group) * m.exact;
    std::vector<T> row(m.dim);
    for (int64_t slot = 0; slot < m.held(); ++slot) {
      int64_t source = slot;
      if (slot >= m.window) {
        if (from[slot - m.window] >= 0) source = from[slot - m.window];
      } else if (const int64_t position = s.ring_position(s.end(), slot); position >= s.first) {
        source = s.source_of(position);
      }
      const int64_t at_row = s.state_row(slot, head) * m.dim;
      load_row(row.data(), grad_k.const_data_ptr<S>() + at_row, m.dim);
      if (slot >= m.window) {
        add_key(s, source, head, row);
      } else {
        axpy_row(key(s, source, head), row.data(), m.dim, T(1));
      }
      load_row(row.data(), grad_v.const_data_ptr<S>() + at_row, m.dim);
      axpy_row(value(s, source, head), row.data(), m.dim, T(1));
      if (head == group) *gate(s, source, group) += grad_gate.const_data_ptr<T>()[(s.n * m.groups + group) * m.held() + slot];
    }
  }

  // The summary bank backwards through the chunks: derivation in kernels/bank_scan/README.md. Slots meet only in the assignment,
  // which is a constant.
  struct Snapshots {
    at::Tensor k, v, mass;
  };
  void summaries(const Sequence<S>& s, const Snapshots& read, const Snapshots& grad_read, const Snapshots& grad_new,
                 const at::Tensor& assignment, const std::vector<T>& stay) const {
    for (int64_t slot = 0; slot < m.summary; ++slot) {
      T grad_mass = grad_new.mass.template const_data_ptr<T>()[s.n * m.summary + slot];
      at::Tensor grads = at::empty({2, m.kv_heads, m.dim}, to.k.options());
      T *gk = grads.data_ptr<T>(), *gv = gk + m.kv_heads * m.dim;
      for (int64_t h = 0; h < m.kv_heads; ++h) {
        std::copy_n(grad_new.k.template const_data_ptr<T>() + s.summary_row(s.n, h, slot), m.dim, gk + h * m.dim);
        std::copy_n(grad_new.v.template const_data_ptr<T>() + s.summary_row(s.n, h, slot), m.dim, gv + h * m.dim);
      }
      for (int64_t i = s.chunks - 1; i >= 0; --i) {
        const int64_t row = s.row0 + i, start = s.chunk_start(i);
        if (!(read.mass.template const_data_ptr<T>()[row * m.summary + slot] > T(0))) {
          grads.zero_();
          grad_mass = T(0);
          continue;
        }
        for (int64_t h = 0; h < m.kv_heads; ++h) {
          axpy_row(gk + h * m.dim, grad_read.k.template const_data_ptr<T>() + s.summary_row(row, h, slot), m.dim, T(1));
          axpy_row(gv + h * m.dim, grad_read.v.template const_data_ptr<T>() + s.summary_row(row, h, slot), m.dim, T(1));
        }
        grad_mass += grad_read.mass.template const_data_ptr<T>()[row * m.summary + slot];
        if (s.evicts(start)) {
          grad_mass = chunk_backward(s, slot, i, read, assignment, stay, gk, gv, grad_mass);
        }
      }
      for (int64_t h = 0; h < m.kv_heads; ++h) {
        std::copy_n(gk + h * m.dim, m.dim, to.summary_k.template data_ptr<T>() + s.summary_row(s.n, h, slot));
        std::copy_n(gv + h * m.dim, m.dim, to.summary_v.template data_ptr<T>() + s.summary_row(s.n, h, slot));
      }
      to.summary_mass.template data_ptr<T>()[s.n * m.summary + slot] = grad_mass;
    }
  }

 private:
  // One slot, one chunk: turns gk, gv (Hkv, D), gradients of the slot after the chunk, into those before it, and returns that of
  // the mass before it.
  T chunk_backward(const Sequence<S>& s, int64_t slot, int64_t i, const Snapshots& read, const at::Tensor& assignment,
                   const std::vector<T>& stay, T* gk, T* gv, T grad_mass) const {
    const int64_t row = s.row0 + i, evicted = s.chunk_start(i) - m.window;
    std::vector<int64_t> members;
    std::vector<T> gates;
    T mass = 0;
    for (int64_t c = 0; c < m.chunk; ++c) {
      if (assignment.const_data_ptr<int32_t>()[row * m.chunk + c] != slot) continue;
      members.push_back(s.source_of(evicted + c));
      gates.push_back(sigmoid(s.gate(members.back(), 0)));
      mass += gates.back();
    }
    if (members.empty()) return grad_mass;
    const bool carried = i == 0;
    const int64_t outer = carried ? s.n : row - 1;
    const at::Tensor &old_k = carried ? m.state.summary_k : read.k, &old_v = carried ? m.state.summary_v : read.v,
                     &old_mass = carried ? m.state.summary_mass : read.mass;
    const bool used = old_mass.const_data_ptr<T>()[outer * m.summary + slot] > T(0);

    std::vector<S> turned(m.dim);
    std::vector<T> mean_k(m.dim), mean_v(m.dim), grad_row(m.dim), along(members.size(), T(0));
    T share = grad_mass;  // of every member's gate: what all of them move together
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      std::fill(mean_k.begin(), mean_k.end(), T(0));
      std::fill(mean_v.begin(), mean_v.end(), T(0));
      for (size_t j = 0; j < members.size(); ++j) {
        s.bank_key(turned.data(), members[j], h);
        const S* value_row = s.value(members[j], h);
        for (int64_t d = 0; d < m.dim; ++d) {
          mean_k[d] += gates[j] / mass * key_factor<T>(m.options, d, m.dim) * static_cast<T>(turned[d]);
          mean_v[d] += gates[j] / mass * static_cast<T>(value_row[d]);
        }
      }
      T *grad_k = gk + h * m.dim, *grad_v = gv + h * m.dim, rate = 1;
      if (used) {
        const T* before_k = old_k.const_data_ptr<T>() + s.summary_row(outer, h, slot);
        const T* before_v = old_v.const_data_ptr<T>() + s.summary_row(outer, h, slot);
        T grad_rate = 0;
        for (int64_t d = 0; d < m.dim; ++d) {
          grad_rate += grad_k[d] * (mean_k[d] - before_k[d]) + grad_v[d] * (mean_v[d] - before_v[d]);
        }
        const T log_stay = std::log(stay[h]), kept = std::pow(stay[h], mass);
        rate = T(1) - kept;
        share -= grad_rate * kept * log_stay;
        to.eta.template data_ptr<T>()[s.n * m.kv_heads + h] += grad_rate * mass * kept * (T(1) - stay[h]);
      }
      for (size_t j = 0; j < members.size(); ++j) {
        s.bank_key(turned.data(), members[j], h);
        const S* value_row = s.value(members[j], h);
        T* to_v = value(s, members[j], h);
        const T weight = rate * gates[j] / mass;
        for (int64_t d = 0; d < m.dim; ++d) {
          const T factor = key_factor<T>(m.options, d, m.dim);
          along[j] += rate / mass * (grad_k[d] * (factor * static_cast<T>(turned[d]) - mean_k[d]) +
                                     grad_v[d] * (static_cast<T>(value_row[d]) - mean_v[d]));
          grad_row[d] = weight * factor * grad_k[d];
          to_v[d] += weight * grad_v[d];
        }
        add_key(s, members[j], h, grad_row);
      }
      scale_row(grad_k, m.dim, used ? T(1) - rate : T(0));
      scale_row(grad_v, m.dim, used ? T(1) - rate : T(0));
    }
    for (size_t j = 0; j < members.size(); ++j) {
      *gate(s, members[j], 0) += (along[j] + share) * gates[j] * (T(1) - gates[j]);
    }
    return used ? grad_mass : T(0);
  }
};

using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                  at::Tensor, at::Tensor>;

BackwardResult bank_scan_backward(
    const at::Tensor& grad_summary_k, const at::Tensor& grad_summary_v, const at::Tensor& grad_summary_mass,
    const at::Tensor& grad_new_k_, const at::Tensor& grad_new_v_, const at::Tensor& grad_new_gate_,
    const at::Tensor& grad_new_summary_k, const at::Tensor& grad_new_summary_v, const at::Tensor& grad_new_summary_mass,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& source_, const at::Tensor& assignment_,
    CODA_MEMORY_PARAMS) {
  const MemoryOptions options = CODA_MEMORY_OPTIONS;
  const auto source = source_.contiguous(), assignment = assignment_.contiguous(), grad_new_k = grad_new_k_.contiguous(),
             grad_new_v = grad_new_v_.contiguous(), grad_new_gate = grad_new_gate_.contiguous();
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "coda::bank_scan", [&]() -> BackwardResult {
    const Memory<scalar_t> m(k, v, gate, cu_seqlens, state, inv_freq, options);
    const Backward<scalar_t> backward(m);
    const auto stay = staying_rates<acc_t<scalar_t>>(eta_logit);
    using Snapshots = typename Backward<scalar_t>::Snapshots;
    const Snapshots read{summary_k.contiguous(), summary_v.contiguous(), summary_mass.contiguous()};
    const Snapshots grad_read{grad_summary_k.contiguous(), grad_summary_v.contiguous(), grad_summary_mass.contiguous()};
    const Snapshots grad_new{grad_new_summary_k.contiguous(), grad_new_summary_v.contiguous(), grad_new_summary_mass.contiguous()};
    at::parallel_for(0, m.sequences, 1, [&](int64_t begin, int64_t end) {
      const c10::InferenceMode no_autograd;
      for (int64_t n = begin; n < end; ++n) {
        const Sequence<scalar_t> s(m, n);
        for (int64_t head = 0; head < m.kv_heads; ++head) {
          backward.copies(s, head, grad_new_k, grad_new_v, grad_new_gate, source);
        }
        if (m.summary > 0) backward.summaries(s, read, grad_read, grad_new, assignment, stay);
      }
    });
    const auto& g = backward.to;
    const auto dtype = k.scalar_type();
    return {g.k.to(dtype),
            g.v.to(dtype),
            g.gate,
            g.state_k.to(dtype),
            g.state_v.to(dtype),
            g.state_gate,
            g.summary_k,
            g.summary_v,
            g.summary_mass,
            eta_logit ? g.eta.sum(0).to(eta_logit->scalar_type()) : at::empty({0}, g.eta.options())};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) {
  m.impl("_bank_scan_forward", bank_scan_forward);
  m.impl("_bank_scan_backward", bank_scan_backward);
}

}  // namespace coda::cpu
