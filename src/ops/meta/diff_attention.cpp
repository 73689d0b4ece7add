#include <torch/library.h>

#include "../memory_args.h"
#include "like.h"

namespace coda::meta {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> diff_attention_forward(
    const at::Tensor& q, const at::Tensor& /*k*/, const at::Tensor& /*v*/, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& /*theta*/, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& /*cu_seqlens_q*/, const std::optional<at::Tensor>& /*cu_seqlens_k*/, bool /*causal*/,
    std::optional<double> /*scale*/, std::string_view theta_pairs, double /*norm_eps*/, bool save) {
  parse_pairs(std::string(theta_pairs));
  return attention_outputs(q, lam.has_value(), norm_weight.has_value(), save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> diff_attention_backward(
    const at::Tensor& /*grad_y*/, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& /*cu_seqlens_q*/,
    const std::optional<at::Tensor>& /*cu_seqlens_k*/, const at::Tensor& /*y*/, const at::Tensor& /*o2*/,
    const at::Tensor& /*diff*/, const at::Tensor& /*lse*/, bool /*causal*/, std::optional<double> /*scale*/,
    std::string_view /*theta_pairs*/, double /*norm_eps*/) {
  return {contiguous_like(q),
          contiguous_like(k),
          contiguous_like(v),
          gradient_like(lam, q.options()),
          gradient_like(theta, wide(q)),
          gradient_like(norm_weight, wide(q))};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Meta, m) {
  m.impl("_diff_attention_forward", diff_attention_forward);
  m.impl("_diff_attention_backward", diff_attention_backward);
}

}  // namespace coda::meta
