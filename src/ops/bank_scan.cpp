#include <ATen/core/dispatch/Dispatcher.h>
#include <coda/ops/bounded.h>
#include <torch/library.h>

#include "check.h"
#include "dispatch.h"

namespace coda {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> dispatch::bank_scan(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("coda::bank_scan", "").typed<decltype(dispatch::bank_scan)>();
  return op.call(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_ARGS);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
dispatch::bank_scan_forward(const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens,
                            at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                            CODA_MEMORY_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_bank_scan_forward", "")
                             .typed<decltype(dispatch::bank_scan_forward)>();
  return op.call(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_ARGS);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor>
dispatch::bank_scan_backward(const at::Tensor& grad_summary_k, const at::Tensor& grad_summary_v,
                             const at::Tensor& grad_summary_mass, const at::Tensor& grad_new_k, const at::Tensor& grad_new_v,
                             const at::Tensor& grad_new_gate, const at::Tensor& grad_new_summary_k,
                             const at::Tensor& grad_new_summary_v, const at::Tensor& grad_new_summary_mass,
                             const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens,
                             at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                             const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                             const at::Tensor& source, const at::Tensor& assignment, CODA_MEMORY_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_bank_scan_backward", "")
                             .typed<decltype(dispatch::bank_scan_backward)>();
  return op.call(grad_summary_k, grad_summary_v, grad_summary_mass, grad_new_k, grad_new_v, grad_new_gate,
                 grad_new_summary_k, grad_new_summary_v, grad_new_summary_mass, k, v, gate, cu_seqlens, state, eta_logit,
                 inv_freq, summary_k, summary_v, summary_mass, source, assignment, CODA_MEMORY_ARGS);
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> bank_scan_explicit(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS) {
  check_bank_scan(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS);
  auto [index, summary_k, summary_v, summary_mass, new_state, source, assignment] =
      dispatch::bank_scan_forward(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_ARGS);
  return {index, summary_k, summary_v, summary_mass, new_state};
}

}  // namespace

std::tuple<Snapshots, State> bank_scan(const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
                                       const at::Tensor& cu_seqlens, const State& state,
                                       const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                                       const MemoryOptions& memory) {
  auto [index, summary_k, summary_v, summary_mass, new_state] = dispatch::bank_scan(
      k, v, gate, cu_seqlens, state.tensors(), eta_logit, inv_freq, CODA_MEMORY_VALUES(memory));
  return {Snapshots{index, summary_k, summary_v, summary_mass}, State::from_tensors(new_state)};
}

TORCH_LIBRARY_IMPL(coda, CompositeExplicitAutograd, m) { m.impl("bank_scan", bank_scan_explicit); }

}  // namespace coda
