#include <torch/library.h>

#include <coda/state.h>

#include "../memory_args.h"
#include "like.h"

namespace coda::meta {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bounded_attention_forward(
    const at::Tensor& q, const at::Tensor& /*k*/, const at::Tensor& /*v*/, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& /*theta*/, const std::optional<at::Tensor>& norm_weight, const at::Tensor& /*gate*/,
    const at::Tensor& /*cu_seqlens*/, at::TensorList /*state*/, const at::Tensor& /*index*/, const at::Tensor& /*summary_k*/,
    const at::Tensor& /*summary_v*/, const at::Tensor& /*summary_mass*/, const at::Tensor& /*inv_freq*/, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS, bool save) {
  CODA_MEMORY_OPTIONS;
  CODA_ATTENTION_OPTIONS;
  return attention_outputs(q, lam.has_value(), norm_weight.has_value(), save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor>
bounded_attention_backward(const at::Tensor& /*grad_y*/, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                           const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                           const at::Tensor& /*cu_seqlens*/, at::TensorList state, const at::Tensor& /*index*/,
                           const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                           const at::Tensor& /*inv_freq*/, const at::Tensor& /*y*/, const at::Tensor& /*o2*/,
                           const at::Tensor& /*diff*/, const at::Tensor& /*lse*/, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  CODA_MEMORY_OPTIONS;
  CODA_ATTENTION_OPTIONS;
  const auto held = State::from_tensors(state);
  return {contiguous_like(q),
          contiguous_like(k),
          contiguous_like(v),
          gradient_like(lam, q.options()),
          gradient_like(theta, wide(q)),
          gradient_like(norm_weight, wide(q)),
          contiguous_like(gate),
          contiguous_like(held.k),
          contiguous_like(held.v),
          contiguous_like(held.gate),
          contiguous_like(summary_k),
          contiguous_like(summary_v),
          contiguous_like(summary_mass)};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Meta, m) {
  m.impl("_bounded_attention_forward", bounded_attention_forward);
  m.impl("_bounded_attention_backward", bounded_attention_backward);
}

}  // namespace coda::meta
