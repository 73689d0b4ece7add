#include <coda/ops/route_exact_bank.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace coda {

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_exact_bank(
    const at::Tensor& value, const at::Tensor& gate, const at::Tensor& position, const at::Tensor& bank_value,
    const at::Tensor& used, const at::Tensor& last_touch, double tau_exact, double tau_novel, double tau_match,
    bool refresh_on_hit, int64_t num_sinks) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::route_exact_bank", "")
                             .typed<decltype(coda::route_exact_bank)>();
  return op.call(value, gate, position, bank_value, used, last_touch, tau_exact, tau_novel, tau_match, refresh_on_hit,
                 num_sinks);
}

// Routing is a constant to autograd.
TORCH_LIBRARY_IMPL(coda, Autograd, m) { m.impl("route_exact_bank", torch::CppFunction::makeFallthrough()); }

}  // namespace coda
