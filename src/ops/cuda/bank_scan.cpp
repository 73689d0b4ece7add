#include <algorithm>
#include <vector>

#include <ATen/TensorOperators.h>
#include <kernels/bank_scan/launch.h>
#include <torch/library.h>

#include "../memory_args.h"
#include "launch.h"

namespace coda::cuda {
namespace {

// The arguments in the form that kernels take; keeps the tensors alive.
struct Problem {
  at::Tensor k, v, gate, cu_seqlens, eta_logit, inv_freq;
  State state;
  BankKeys turned;
  kernels::BankScanParams params{};

  Problem(const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& gate_, const at::Tensor& cu_seqlens_,
          at::TensorList state_, const std::optional<at::Tensor>& eta_logit_, const at::Tensor& inv_freq_,
          const MemoryOptions& memory)
      : k(k_.contiguous()), v(v_.contiguous()), gate(gate_.contiguous()), cu_seqlens(int64(cu_seqlens_)),
        eta_logit(widened(eta_logit_, k_)), inv_freq(inv_freq_.contiguous()), state(contiguous_state(state_)) {
    auto& p = params;
    p.sequences = state.k.size(0);
    p.tokens = k.size(0);
    p.chunk_rows = p.tokens / memory.chunk + 2 * p.sequences;
    p.kv_heads = static_cast<int>(k.size(1));
    p.dim = static_cast<int>(k.size(2));
    p.gate_groups = static_cast<int>(state.gate.size(1));
    p.window = static_cast<int>(memory.window);
    p.chunk = static_cast<int>(memory.chunk);
    p.exact_slots = static_cast<int>(state.exact_pos.size(2));
    p.summary_slots = static_cast<int>(state.summary_mass.size(1));
    p.num_sinks = static_cast<int>(memory.num_sinks);
    p.novelty = memory.policy == Policy::kNoveltyLru;
    p.has_bank_distance = memory.bank_distance.has_value();
    p.rope_interleaved = interleaved(memory.rope_pairs);
    p.refresh_on_hit = memory.refresh_on_hit;
    p.low_freq_key = memory.summary_routing == SummaryRouting::kLowFreqKey;
    p.exact_candidates = static_cast<int>(std::min(memory.exact_candidates, memory.chunk));
    p.age_decay = memory.age_decay;
    p.exact_threshold = logit(memory.tau_exact);
    p.summary_threshold = logit(memory.tau_summary);
    p.tau_novel = memory.tau_novel;
    p.tau_match = memory.tau_match;
    p.tau_spawn = memory.tau_spawn;
    // Only the summary bank reads turned keys; copies into the exact bank turn their own.
    turned = p.summary_slots > 0 ? bank_keys(k, state, cu_seqlens, inv_freq, memory) : BankKeys{k, state.k};
    p.k = read(k);
    p.v = read(v);
    p.gate = read(gate);
    p.cu_seqlens = read<int64_t>(cu_seqlens);
    p.state_k = read(state.k);
    p.state_v = read(state.v);
    p.state_gate = read(state.gate);
    p.exact_pos = read<int64_t>(state.exact_pos);
    p.tokens_seen = read<int64_t>(state.tokens_seen);
    p.last_touch = read<int64_t>(state.last_touch);
    p.state_summary_k = read(state.summary_k);
    p.state_summary_v = read(state.summary_v);
    p.state_summary_mass = read(state.summary_mass);
    p.eta_logit = read(eta_logit);
    p.inv_freq = read<double>(inv_freq);
    p.kbar = read(turned.fresh);
    p.state_kbar = read(turned.state);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor> forward(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS) {
  const c10::cuda::CUDAGuard guard(k.device());
  const Problem problem(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS);
  auto p = with_outputs<kernels::BankScanForward>(problem.params);
  const auto& held = problem.state;
  const auto int32 = k.options().dtype(at::kInt);
  const auto fresh = [](const at::Tensor& t) { return at::empty(t.sizes(), t.options()); };
  const auto index_shape = {p.chunk_rows, static_cast<int64_t>(p.gate_groups), static_cast<int64_t>(p.exact_slots)};
  const auto index = at::empty(index_shape, int32);
  const auto summary_k = at::empty({p.chunk_rows, p.kv_heads, p.summary_slots, p.dim}, held.summary_k.options());
  const auto summary_v = at::empty_like(summary_k);
  const auto summary_mass = at::empty({p.chunk_rows, p.summary_slots}, held.summary_mass.options());
  const auto source = at::empty({p.sequences, p.gate_groups, p.exact_slots}, int32);
  const auto assignment = at::empty({p.chunk_rows, p.summary_slots > 0 ? p.chunk : 0}, int32);
  const State made{.k = fresh(held.k),
                   .v = fresh(held.v),
                   .gate = fresh(held.gate),
                   .exact_pos = fresh(held.exact_pos),
                   .tokens_seen = fresh(held.tokens_seen),
                   .last_touch = fresh(held.last_touch),
                   .counts = fresh(held.counts),
                   .summary_k = fresh(held.summary_k),
                   .summary_v = fresh(held.summary_v),
                   .summary_mass = fresh(held.summary_mass)};
  p.index = data<int32_t>(index);
  p.summary_k = data(summary_k);
  p.summary_v = data(summary_v);
  p.summary_mass = data(summary_mass);
  p.source = data<int32_t>(source);
  p.assignment = data<int32_t>(assignment);
  p.new_k = data(made.k);
  p.new_v = data(made.v);
  p.new_gate = data(made.gate);
  p.new_exact_pos = data<int64_t>(made.exact_pos);
  p.new_last_touch = data<int64_t>(made.last_touch);
  p.counts = read<int64_t>(held.counts);
  p.new_tokens_seen = data<int64_t>(made.tokens_seen);
  p.new_counts = data<int64_t>(made.counts);
  p.new_summary_k = data(made.summary_k);
  p.new_summary_v = data(made.summary_v);
  p.new_summary_mass = data(made.summary_mass);
  const auto dtype = dtype_of(k);
  const auto scratch = workspace(kernels::bank_scan_workspace(p, dtype), k);
  p.workspace = data(scratch);
  C10_CUDA_CHECK(kernels::bank_scan_forward(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return {index, summary_k, summary_v, summary_mass, made.tensors(), source, assignment};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor>
backward(const at::Tensor& grad_summary_k_, const at::Tensor& grad_summary_v_, const at::Tensor& grad_summary_mass_,
         const at::Tensor& grad_new_k_, const at::Tensor& grad_new_v_, const at::Tensor& grad_new_gate_,
         const at::Tensor& grad_new_summary_k_, const at::Tensor& grad_new_summary_v_,
         const at::Tensor& grad_new_summary_mass_, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
         const at::Tensor& cu_seqlens, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
         const at::Tensor& inv_freq, const at::Tensor& summary_k_, const at::Tensor& summary_v_,
         const at::Tensor& summary_mass_, const at::Tensor& source_, const at::Tensor& assignment_, CODA_MEMORY_PARAMS) {
  const c10::cuda::CUDAGuard guard(k.device());
  const Problem problem(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS);
  auto p = with_outputs<kernels::BankScanBackward>(problem.params);
  const auto& held = problem.state;
  const auto options = wide(k);
  const auto summary_k = summary_k_.contiguous(), summary_v = summary_v_.contiguous(),
             summary_mass = summary_mass_.contiguous(), source = source_.contiguous(), assignment = assignment_.contiguous();
  const auto grad_summary_k = grad_summary_k_.contiguous(), grad_summary_v = grad_summary_v_.contiguous(),
             grad_summary_mass = grad_summary_mass_.contiguous(), grad_new_k = grad_new_k_.contiguous(),
             grad_new_v = grad_new_v_.contiguous(), grad_new_gate = grad_new_gate_.contiguous(),
             grad_new_summary_k = grad_new_summary_k_.contiguous(), grad_new_summary_v = grad_new_summary_v_.contiguous(),
             grad_new_summary_mass = grad_new_summary_mass_.contiguous();
  // Several paths meet in one token, so gradients gather in the accumulation type.
  const auto grad_k = at::empty(k.sizes(), options), grad_v = at::empty(v.sizes(), options),
             grad_state_k = at::empty(held.k.sizes(), options), grad_state_v = at::empty(held.v.sizes(), options);
  const auto gate_partial = at::empty({p.tokens, p.kv_heads}, options);
  const auto state_gate_partial = at::empty({p.sequences, p.kv_heads, held.k.size(2)}, options);
  const auto grad_state_summary_k = at::empty(held.summary_k.sizes(), options),
             grad_state_summary_v = at::empty(held.summary_v.sizes(), options),
             grad_state_summary_mass = at::empty(held.summary_mass.sizes(), options);
  const auto eta_partial = at::zeros({p.sequences, p.summary_slots, p.kv_heads}, options);
  p.summary_k = read(summary_k);
  p.summary_v = read(summary_v);
  p.summary_mass = read(summary_mass);
  p.source = read<int32_t>(source);
  p.assignment = read<int32_t>(assignment);
  p.grad_summary_k = read(grad_summary_k);
  p.grad_summary_v = read(grad_summary_v);
  p.grad_summary_mass = read(grad_summary_mass);
  p.grad_new_k = read(grad_new_k);
  p.grad_new_v = read(grad_new_v);
  p.grad_new_gate = read(grad_new_gate);
  p.grad_new_summary_k = read(grad_new_summary_k);
  p.grad_new_summary_v = read(grad_new_summary_v);
  p.grad_new_summary_mass = read(grad_new_summary_mass);
  p.grad_k = data(grad_k);
  p.grad_v = data(grad_v);
  p.gate_partial = data(gate_partial);
  p.grad_state_k = data(grad_state_k);
  p.grad_state_v = data(grad_state_v);
  p.state_gate_partial = data(state_gate_partial);
  p.grad_state_summary_k = data(grad_state_summary_k);
  p.grad_state_summary_v = data(grad_state_summary_v);
  p.grad_state_summary_mass = data(grad_state_summary_mass);
  p.eta_partial = data(eta_partial);
  C10_CUDA_CHECK(kernels::bank_scan_backward(p, dtype_of(k), c10::cuda::getCurrentCUDAStream()));
  const bool shared = p.gate_groups < p.kv_heads;
  return {grad_k.to(k.scalar_type()),
          grad_v.to(v.scalar_type()),
          gradient_like(shared ? gate_partial.sum(1, true) : gate_partial, gate),
          grad_state_k.to(held.k.scalar_type()),
          grad_state_v.to(held.v.scalar_type()),
          shared ? state_gate_partial.sum(1, true) : state_gate_partial,
          grad_state_summary_k,
          grad_state_summary_v,
          grad_state_summary_mass,
          eta_logit ? gradient_like(eta_partial.sum(at::IntArrayRef{0, 1}), eta_logit) : at::empty({0}, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) {
  m.impl("_bank_scan_forward", forward);
  m.impl("_bank_scan_backward", backward);
}

}  // namespace coda::cuda
