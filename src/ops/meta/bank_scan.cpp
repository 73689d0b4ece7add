#include <vector>

#include <torch/library.h>

#include <coda/state.h>

#include "../memory_args.h"
#include "like.h"

namespace coda::meta {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor> bank_scan_forward(
    const at::Tensor& k, const at::Tensor& /*v*/, const at::Tensor& /*gate*/, const at::Tensor& /*cu_seqlens*/,
    at::TensorList state, const std::optional<at::Tensor>& /*eta_logit*/, const at::Tensor& /*inv_freq*/,
    CODA_MEMORY_PARAMS) {
  const auto options = CODA_MEMORY_OPTIONS;
  const auto held = State::from_tensors(state);
  const auto sequences = held.k.sym_size(0), rows = k.sym_size(0) / options.chunk + sequences * 2;
  const auto groups = held.gate.sym_size(1), exact = held.exact_pos.sym_size(2), summary = held.summary_mass.sym_size(1);
  const auto int32 = k.options().dtype(at::kInt);
  const auto summary_k = at::empty_symint({rows, k.sym_size(1), summary, k.sym_size(2)}, held.summary_k.options());
  std::vector<at::Tensor> new_state;
  for (const auto& t : state) new_state.push_back(contiguous_like(t));
  return {at::empty_symint({rows, groups, exact}, int32),
          summary_k,
          contiguous_like(summary_k),
          at::empty_symint({rows, summary}, held.summary_mass.options()),
          new_state,
          at::empty_symint({sequences, groups, exact}, int32),
          at::empty_symint({rows, summary > 0 ? c10::SymInt(options.chunk) : c10::SymInt(0)}, int32)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor>
bank_scan_backward(const at::Tensor& /*grad_summary_k*/, const at::Tensor& /*grad_summary_v*/,
                   const at::Tensor& /*grad_summary_mass*/, const at::Tensor& /*grad_new_k*/,
                   const at::Tensor& /*grad_new_v*/, const at::Tensor& /*grad_new_gate*/,
                   const at::Tensor& /*grad_new_summary_k*/, const at::Tensor& /*grad_new_summary_v*/,
                   const at::Tensor& /*grad_new_summary_mass*/, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& gate, const at::Tensor& /*cu_seqlens*/, at::TensorList state,
                   const std::optional<at::Tensor>& eta_logit, const at::Tensor& /*inv_freq*/,
                   const at::Tensor& /*summary_k*/, const at::Tensor& /*summary_v*/, const at::Tensor& /*summary_mass*/,
                   const at::Tensor& /*source*/, const at::Tensor& /*assignment*/, CODA_MEMORY_PARAMS) {
  CODA_MEMORY_OPTIONS;
  const auto held = State::from_tensors(state);
  return {contiguous_like(k),
          contiguous_like(v),
          contiguous_like(gate),
          contiguous_like(held.k),
          contiguous_like(held.v),
          contiguous_like(held.gate),
          contiguous_like(held.summary_k),
          contiguous_like(held.summary_v),
          contiguous_like(held.summary_mass),
          gradient_like(eta_logit, wide(k))};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Meta, m) {
  m.impl("_bank_scan_forward", bank_scan_forward);
  m.impl("_bank_scan_backward", bank_scan_backward);
}

}  // namespace coda::meta
