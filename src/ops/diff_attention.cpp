#include <coda/ops/diff_attention.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "check.h"
#include "dispatch.h"

namespace coda {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch::diff_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
    CODA_ATTENTION_PARAMS, bool save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_diff_attention_forward", "")
                             .typed<decltype(dispatch::diff_attention_forward)>();
  return op.call(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal, CODA_ATTENTION_ARGS, save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch::diff_attention_backward(
    const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, const at::Tensor& y, const at::Tensor& o2, const at::Tensor& diff,
    const at::Tensor& lse, bool causal, CODA_ATTENTION_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_diff_attention_backward", "")
                             .typed<decltype(dispatch::diff_attention_backward)>();
  return op.call(grad_y, q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, y, o2, diff, lse, causal,
                 CODA_ATTENTION_ARGS);
}

namespace {

at::Tensor diff_attention_explicit(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                   const std::optional<at::Tensor>& norm_weight,
                                   const std::optional<at::Tensor>& cu_seqlens_q,
                                   const std::optional<at::Tensor>& cu_seqlens_k, bool causal, CODA_ATTENTION_PARAMS) {
  check_diff_attention(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k);
  return std::get<0>(dispatch::diff_attention_forward(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal,
                                                      CODA_ATTENTION_ARGS, /*save=*/false));
}

}  // namespace

at::Tensor diff_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                          const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                          const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
                          bool causal, const AttentionOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::diff_attention", "")
                             .typed<decltype(diff_attention_explicit)>();
  return op.call(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal, CODA_ATTENTION_VALUES(options));
}

TORCH_LIBRARY_IMPL(coda, CompositeExplicitAutograd, m) { m.impl("diff_attention", diff_attention_explicit); }

}  // namespace coda
