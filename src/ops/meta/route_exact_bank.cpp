#include <torch/library.h>

#include "../check.h"
#include "like.h"

namespace coda::meta {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_exact_bank(
    const at::Tensor& value, const at::Tensor& gate, const at::Tensor& position, const at::Tensor& bank_value,
    const at::Tensor& used, const at::Tensor& last_touch, double /*tau_exact*/, double /*tau_novel*/, double /*tau_match*/,
    bool /*refresh_on_hit*/, int64_t num_sinks) {
  check_route_exact_bank(value, gate, position, bank_value, used, last_touch, num_sinks);
  return {contiguous_like(position), contiguous_like(position), contiguous_like(last_touch)};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Meta, m) { m.impl("route_exact_bank", route_exact_bank); }

}  // namespace coda::meta
