#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <coda/ops/bounded.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "memory_args.h"

namespace coda {
namespace {

at::Tensor decode_step_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate, at::TensorList state,
                                const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                                CODA_ATTENTION_PARAMS);

at::Tensor call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("coda::decode_step_", "").typed<decltype(decode_step_autograd)>();
  return op.call(q, k, v, lam, theta, norm_weight, gate, state, eta_logit, inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
}

at::Tensor decode_step_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate, at::TensorList state,
                                const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                                CODA_ATTENTION_PARAMS) {
  TORCH_CHECK(!torch::autograd::compute_requires_grad(q, k, v, lam, theta, norm_weight, gate, state, eta_logit),
              "decode_step_ changes the state in place and is not differentiable, but an input requires grad; use "
              "bounded_attention to train or torch.no_grad() to decode");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto y = call(q, k, v, lam, theta, norm_weight, gate, state, eta_logit, inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
    // A graph that still needs the old contents must notice.
    for (const auto& t : state) {
      if (!t.is_inference()) torch::autograd::increment_version(t);
    }
    return y;
  }
}

}  // namespace

at::Tensor decode_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                        const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                        const at::Tensor& gate, State& state, const std::optional<at::Tensor>& eta_logit,
                        const at::Tensor& inv_freq, const MemoryOptions& memory, const AttentionOptions& attention) {
  return call(q, k, v, lam, theta, norm_weight, gate, state.tensors(), eta_logit, inv_freq, CODA_MEMORY_VALUES(memory),
              CODA_ATTENTION_VALUES(attention));
}

TORCH_LIBRARY_IMPL(coda, Autograd, m) { m.impl("decode_step_", decode_step_autograd); }

}  // namespace coda
