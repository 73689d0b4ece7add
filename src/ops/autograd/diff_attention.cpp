#include <torch/library.h>

#include "../check.h"
#include "../dispatch.h"
#include "function.h"

namespace coda::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct DiffAttention : torch::autograd::Function<DiffAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                            const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
                            const std::optional<at::Tensor>& cu_seqlens_k, const OptionsPtr& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, o2, diff, lse] =
        dispatch::diff_attention_forward(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, options->causal,
                                         CODA_ATTENTION_VALUES(options->attention), /*save=*/true);
    ctx->save_for_backward({q, k, v, or_undefined(lam), or_undefined(theta), or_undefined(norm_weight),
                            or_undefined(cu_seqlens_q), or_undefined(cu_seqlens_k), y, o2, diff, lse});
    save(ctx, options);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto options = saved_options(ctx);
    const auto [grad_q, grad_k, grad_v, grad_lam, grad_theta, grad_norm_weight] = dispatch::diff_attention_backward(
        grads[0], s[0], s[1], s[2], if_defined(s[3]), if_defined(s[4]), if_defined(s[5]), if_defined(s[6]), if_defined(s[7]),
        s[8], s[9], s[10], s[11], options->causal, CODA_ATTENTION_VALUES(options->attention));
    return {grad_q, grad_k, grad_v, only_if(s[3].defined(), grad_lam), only_if(s[4].defined(), grad_theta),
            only_if(s[5].defined(), grad_norm_weight), {}, {}, {}};
  }
};

at::Tensor diff_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                          const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                          const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
                          bool causal, CODA_ATTENTION_PARAMS) {
  check_diff_attention(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k);
  if (!torch::autograd::compute_requires_grad(q, k, v, lam, theta, norm_weight)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return std::get<0>(dispatch::diff_attention_forward(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal,
                                                        CODA_ATTENTION_ARGS, /*save=*/false));
  }
  return DiffAttention::apply(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k,
                              c10::make_intrusive<Options>(MemoryOptions(), CODA_ATTENTION_OPTIONS, causal));
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Autograd, m) {
  m.impl("diff_attention", diff_attention);
  m.impl("_diff_attention_backward", torch::CppFunction::makeFromBoxedFunction<&differentiable_once>());
}

}  // namespace coda::autograd
