#include <torch/library.h>

#include <coda/state.h>

#include "../check.h"
#include "../dispatch.h"
#include "function.h"

namespace coda::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BoundedAttention : torch::autograd::Function<BoundedAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                            const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                            const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                            const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                            const at::Tensor& inv_freq, const OptionsPtr& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, o2, diff, lse] = dispatch::bounded_attention_forward(
        q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v, summary_mass, inv_freq,
        CODA_MEMORY_VALUES(options->memory), CODA_ATTENTION_VALUES(options->attention), /*save=*/true);
    variable_list saved{q, k, v, or_undefined(lam), or_undefined(theta), or_undefined(norm_weight), gate, cu_seqlens, index,
                        summary_k, summary_v, summary_mass, inv_freq, y, o2, diff, lse};
    saved.insert(saved.end(), state.begin(), state.end());
    ctx->save_for_backward(std::move(saved));
    save(ctx, options);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto options = saved_options(ctx);
    const at::TensorList state(s.data() + 17, State::kFields);
    const auto [grad_q, grad_k, grad_v, grad_lam, grad_theta, grad_norm_weight, grad_gate, grad_state_k, grad_state_v,
                grad_state_gate, grad_summary_k, grad_summary_v, grad_summary_mass] =
        dispatch::bounded_attention_backward(grads[0], s[0], s[1], s[2], if_defined(s[3]), if_defined(s[4]), if_defined(s[5]),
                                             s[6], s[7], state, s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16],
                                             CODA_MEMORY_VALUES(options->memory), CODA_ATTENTION_VALUES(options->attention));
    // The carried summary slots reach the queries through the snapshots, so their gradient is theirs.
    const State grad_state{.k = grad_state_k,
                           .v = grad_state_v,
                           .gate = grad_state_gate,
                           .exact_pos = {},
                           .tokens_seen = {},
                           .last_touch = {},
                           .counts = {},
                           .summary_k = {},
                           .summary_v = {},
                           .summary_mass = {}};
    variable_list result{grad_q,
                         grad_k,
                         grad_v,
                         only_if(s[3].defined(), grad_lam),
                         only_if(s[4].defined(), grad_theta),
                         only_if(s[5].defined(), grad_norm_weight),
                         grad_gate,
                         {}};
    for (auto& t : grad_state.tensors()) result.push_back(t);
    result.insert(result.end(), {{}, grad_summary_k, grad_summary_v, grad_summary_mass, {}, {}});
    return result;
  }
};

at::Tensor bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                             const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                             const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                             const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                             const at::Tensor& inv_freq, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  const auto options = c10::make_intrusive<Options>(CODA_MEMORY_OPTIONS, CODA_ATTENTION_OPTIONS);
  check_bounded_attention(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v,
                          summary_mass, inv_freq, options->memory);
  if (!torch::autograd::compute_requires_grad(q, k, v, lam, theta, norm_weight, gate, state, summary_k, summary_v,
                                              summary_mass)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return std::get<0>(dispatch::bounded_attention_forward(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index,
                                                           summary_k, summary_v, summary_mass, inv_freq, CODA_MEMORY_ARGS,
                                                           CODA_ATTENTION_ARGS, /*save=*/false));
  }
  return BoundedAttention::apply(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v,
                                 summary_mass, inv_freq, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Autograd, m) {
  m.impl("bounded_attention", bounded_attention);
  m.impl("_bounded_attention_backward", torch::CppFunction::makeFromBoxedFunction<&differentiable_once>());
}

}  // namespace coda::autograd
