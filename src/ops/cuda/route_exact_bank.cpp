#include <kernels/bank_scan/launch.h>
#include <torch/library.h>

#include "../check.h"
#include "launch.h"

namespace coda::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_exact_bank(
    const at::Tensor& value_, const at::Tensor& gate_, const at::Tensor& position_, const at::Tensor& bank_value_,
    const at::Tensor& used_, const at::Tensor& last_touch_, double tau_exact, double tau_novel, double tau_match,
    bool refresh_on_hit, int64_t num_sinks) {
  check_route_exact_bank(value_, gate_, position_, bank_value_, used_, last_touch_, num_sinks);
  const c10::cuda::CUDAGuard guard(value_.device());
  const auto value = value_.contiguous(), bank_value = bank_value_.contiguous(), used = used_.contiguous();
  const auto gate = gate_.contiguous(), position = position_.contiguous(),
             last_touch = last_touch_.contiguous();
  const auto slot = at::empty(position.sizes(), position.options()), action = at::empty_like(slot),
             new_last_touch = at::empty(last_touch.sizes(), last_touch.options());
  kernels::RouteExactBankParams p{};
  p.batch = value.size(0);
  p.kv_heads = static_cast<int>(value.size(1));
  p.candidates = static_cast<int>(value.size(2));
  p.dim = static_cast<int>(value.size(3));
  p.slots = static_cast<int>(bank_value.size(2));
  p.num_sinks = static_cast<int>(num_sinks);
  p.tau_exact = tau_exact;
  p.tau_novel = tau_novel;
  p.tau_match = tau_match;
  p.refresh_on_hit = refresh_on_hit;
  p.value = read(value);
  p.gate = read(gate);
  p.gate_dtype = dtype_of(gate);
  p.position = read<int64_t>(position);
  p.bank_value = read(bank_value);
  p.used = read<bool>(used);
  p.last_touch = read<int64_t>(last_touch);
  p.slot = data<int64_t>(slot);
  p.action = data<int64_t>(action);
  p.new_last_touch = data<int64_t>(new_last_touch);
  const auto dtype = dtype_of(value);
  const auto scratch = workspace(kernels::route_exact_bank_workspace(p, dtype), value);
  p.workspace = data(scratch);
  C10_CUDA_CHECK(kernels::route_exact_bank(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return {slot, action, new_last_touch};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) { m.impl("route_exact_bank", route_exact_bank); }

}  // namespace coda::cuda
