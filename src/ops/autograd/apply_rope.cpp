#include <torch/library.h>

#include "../dispatch.h"
#include "function.h"

namespace coda::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ApplyRope : torch::autograd::Function<ApplyRope> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq,
                            double attention_scaling, std::string_view pairs, bool inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({positions, inv_freq});
    ctx->saved_data["attention_scaling"] = attention_scaling;
    ctx->saved_data["pairs"] = std::string(pairs);
    ctx->saved_data["inverse"] = inverse;
    return dispatch::apply_rope(x, positions, inv_freq, attention_scaling, pairs, inverse);
  }

  // A rotation's transpose turns back; being the op itself, it is differentiable again.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {dispatch::apply_rope(grads[0], saved[0], saved[1], ctx->saved_data["attention_scaling"].toDouble(),
                                 ctx->saved_data["pairs"].toStringRef(), !ctx->saved_data["inverse"].toBool()),
            {}, {}, {}, {}, {}};
  }
};

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq, double attention_scaling,
                      std::string_view pairs, bool inverse) {
  return ApplyRope::apply(x, positions, inv_freq, attention_scaling, pairs, inverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Autograd, m) { m.impl("apply_rope", apply_rope); }

}  // namespace coda::autograd
