#include <ATen/core/dispatch/Dispatcher.h>
#include <coda/ops/bounded.h>
#include <torch/library.h>

#include "check.h"
#include "dispatch.h"

namespace coda {

at::Tensor dispatch::bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                       const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                                       const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                                       const at::Tensor& summary_k, const at::Tensor& summary_v,
                                       const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                                       CODA_ATTENTION_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::bounded_attention", "")
                             .typed<decltype(dispatch::bounded_attention)>();
  return op.call(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v, summary_mass,
                 inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch::bounded_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS, bool save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_bounded_attention_forward", "")
                             .typed<decltype(dispatch::bounded_attention_forward)>();
  return op.call(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v, summary_mass,
                 inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS, save);
}

void dispatch::bounded_attention_into(
    const at::Tensor& y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_bounded_attention_into_", "")
                             .typed<decltype(dispatch::bounded_attention_into)>();
  op.call(y, q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v, summary_mass,
          inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor>
dispatch::bounded_attention_backward(const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                     const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                     const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                                     const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                                     const at::Tensor& summary_k, const at::Tensor& summary_v,
                                     const at::Tensor& summary_mass, const at::Tensor& inv_freq, const at::Tensor& y,
                                     const at::Tensor& o2, const at::Tensor& diff, const at::Tensor& lse, CODA_MEMORY_PARAMS,
                                     CODA_ATTENTION_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::_bounded_attention_backward", "")
                             .typed<decltype(dispatch::bounded_attention_backward)>();
  return op.call(grad_y, q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v,
                 summary_mass, inv_freq, y, o2, diff, lse, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
}

namespace {

at::Tensor bounded_attention_explicit(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                      const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                                      const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                                      const at::Tensor& summary_k, const at::Tensor& summary_v,
                                      const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                                      CODA_ATTENTION_PARAMS) {
  check_bounded_attention(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v,
                          summary_mass, inv_freq, CODA_MEMORY_OPTIONS);
  return std::get<0>(dispatch::bounded_attention_forward(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index,
                                                         summary_k, summary_v, summary_mass, inv_freq, CODA_MEMORY_ARGS,
                                                         CODA_ATTENTION_ARGS, /*save=*/false));
}

// Where no kernel writes to y itself.
void bounded_attention_copied_into(
    const at::Tensor& y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS) {
  y.copy_(std::get<0>(dispatch::bounded_attention_forward(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v, summary_mass,
                                                          inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS, /*save=*/false)));
}

}  // namespace

at::Tensor bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                             const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                             const at::Tensor& cu_seqlens, const State& state, const Snapshots& snapshots,
                             const at::Tensor& inv_freq, const MemoryOptions& memory, const AttentionOptions& attention) {
  return dispatch::bounded_attention(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state.tensors(), snapshots.index,
                                     snapshots.summary_k, snapshots.summary_v, snapshots.summary_mass, inv_freq,
                                     CODA_MEMORY_VALUES(memory), CODA_ATTENTION_VALUES(attention));
}

TORCH_LIBRARY_IMPL(coda, CompositeExplicitAutograd, m) {
  m.impl("bounded_attention", bounded_attention_explicit);
  m.impl("_bounded_attention_into_", bounded_attention_copied_into);
}

}  // namespace coda
