#include "bank_scan.h"

#include <vector>

#include <ATen/TensorOperators.h>
#include <torch/library.h>

namespace coda::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor> forward(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS) {
  const c10::cuda::CUDAGuard guard(k.device());
  const Scan scan(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS);
  C10_CUDA_CHECK(kernels::bank_scan_forward(scan.params, dtype_of(k), c10::cuda::getCurrentCUDAStream()));
  return {scan.index, scan.summary_k, scan.summary_v, scan.summary_mass, scan.made.tensors(), scan.source, scan.assignment};
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
  const ScanProblem problem(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS);
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
