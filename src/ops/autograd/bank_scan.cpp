#include <torch/library.h>

#include <coda/state.h>

#include "../check.h"
#include "../dispatch.h"
#include "function.h"

namespace coda::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BankScan : torch::autograd::Function<BankScan> {
  // Returns index, summary_k, summary_v, summary_mass and the tensors of the new state.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
                               const at::Tensor& cu_seqlens, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
                               const at::Tensor& inv_freq, const OptionsPtr& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [index, summary_k, summary_v, summary_mass, new_state, source, assignment] = dispatch::bank_scan_forward(
        k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_VALUES(options->memory));
    variable_list saved{k, v, gate, cu_seqlens, or_undefined(eta_logit), inv_freq, summary_k, summary_v, summary_mass, source,
                        assignment};
    saved.insert(saved.end(), state.begin(), state.end());
    ctx->save_for_backward(std::move(saved));
    save(ctx, options);
    const auto made = State::from_tensors(new_state);
    ctx->mark_non_differentiable({index, made.exact_pos, made.tokens_seen, made.last_touch, made.counts});
    variable_list outputs{index, summary_k, summary_v, summary_mass};
    outputs.insert(outputs.end(), new_state.begin(), new_state.end());
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto options = saved_options(ctx);
    const at::TensorList state(s.data() + 11, State::kFields);
    const auto made = State::from_tensors(at::TensorList(grads).slice(4));
    const auto [grad_k, grad_v, grad_gate, grad_state_k, grad_state_v, grad_state_gate, grad_state_summary_k,
                grad_state_summary_v, grad_state_summary_mass, grad_eta_logit] =
        dispatch::bank_scan_backward(grads[1], grads[2], grads[3], made.k, made.v, made.gate, made.summary_k, made.summary_v,
                                     made.summary_mass, s[0], s[1], s[2], s[3], state, if_defined(s[4]), s[5], s[6], s[7],
                                     s[8], s[9], s[10], CODA_MEMORY_VALUES(options->memory));
    const State grad_state{.k = grad_state_k,
                           .v = grad_state_v,
                           .gate = grad_state_gate,
                           .exact_pos = {},
                           .tokens_seen = {},
                           .last_touch = {},
                           .counts = {},
                           .summary_k = grad_state_summary_k,
                           .summary_v = grad_state_summary_v,
                           .summary_mass = grad_state_summary_mass};
    variable_list result{grad_k, grad_v, grad_gate, {}};
    for (auto& t : grad_state.tensors()) result.push_back(t);
    result.insert(result.end(), {only_if(s[4].defined(), grad_eta_logit), {}, {}});
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> bank_scan(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS) {
  const auto options = c10::make_intrusive<Options>(CODA_MEMORY_OPTIONS, AttentionOptions());
  check_bank_scan(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, options->memory);
  const auto out = BankScan::apply(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, options);
  return {out[0], out[1], out[2], out[3], {out.begin() + 4, out.end()}};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Autograd, m) {
  m.impl("bank_scan", bank_scan);
  m.impl("_bank_scan_backward", torch::CppFunction::makeFromBoxedFunction<&differentiable_once>());
}

}  // namespace coda::autograd
