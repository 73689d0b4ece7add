#pragma once

#include <optional>
#include <utility>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <coda/options.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace coda::autograd {

// An absent tensor is undefined among saved variables and gradients.
inline at::Tensor or_undefined(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }
inline std::optional<at::Tensor> if_defined(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }
inline at::Tensor only_if(bool present, const at::Tensor& gradient) { return present ? gradient : at::Tensor(); }

// What a Function keeps of its scalar arguments.
struct Options : torch::CustomClassHolder {
  Options(MemoryOptions memory_, AttentionOptions attention_, bool causal_ = true)
      : memory(std::move(memory_)), attention(std::move(attention_)), causal(causal_) {}

  MemoryOptions memory;
  AttentionOptions attention;
  bool causal;
};
using OptionsPtr = c10::intrusive_ptr<Options>;

inline void save(torch::autograd::AutogradContext* ctx, const OptionsPtr& options) {
  ctx->saved_data["options"] = c10::IValue::make_capsule(options);
}

inline OptionsPtr saved_options(torch::autograd::AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Options>(ctx->saved_data["options"].toCapsule());
}

// The autograd kernel of every coda::_X_backward: its results are right, and whoever asks for their gradients is told.
inline void differentiable_once(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<at::Tensor> inputs;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) inputs.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) inputs.push_back(t);
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  if (!torch::autograd::compute_requires_grad(inputs)) return;
  const std::string prefix = "coda::_", suffix = "_backward", name = op.schema().name();
  const auto public_name = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
  const auto error = std::make_shared<torch::autograd::Error>(
      public_name + " is differentiable once; higher derivatives are not supported", torch::autograd::collect_next_edges(inputs));
  for (const auto& value : torch::jit::last(*stack, op.schema().returns().size())) {
    torch::autograd::set_history(value.toTensor(), error);
  }
}

}  // namespace coda::autograd
