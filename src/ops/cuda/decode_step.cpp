#include <kernels/decode_step/launch.h>
#include <torch/library.h>

#include "../check.h"
#include "../memory_args.h"
#include "launch.h"

namespace coda::cuda {
namespace {

at::Tensor decode_step_(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                        const std::optional<at::Tensor>& lam_, const std::optional<at::Tensor>& theta_,
                        const std::optional<at::Tensor>& norm_weight_, const at::Tensor& gate_, at::TensorList tensors,
                        const std::optional<at::Tensor>& eta_logit_, const at::Tensor& inv_freq_, CODA_MEMORY_PARAMS,
                        CODA_ATTENTION_PARAMS) {
  const MemoryOptions memory = CODA_MEMORY_OPTIONS;
  const AttentionOptions attention = CODA_ATTENTION_OPTIONS;
  check_decode_step(q_, k_, v_, lam_, theta_, norm_weight_, gate_, tensors, eta_logit_, inv_freq_, memory);
  const c10::cuda::CUDAGuard guard(q_.device());
  const auto q = q_.contiguous(), k = k_.contiguous(), v = v_.contiguous(), gate = gate_.contiguous(),
             inv_freq = inv_freq_.contiguous();
  const auto lam = widened(lam_, q), theta = widened(theta_, q), norm_weight = widened(norm_weight_, q),
             eta_logit = widened(eta_logit_, q);
  const auto state = State::from_tensors(tensors);
  const auto y = at::empty(q.sizes(), q.options());
  kernels::DecodeStepParams p{};
  p.sequences = q.size(0);
  p.heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(k.size(1));
  p.dim = static_cast<int>(q.size(2));
  p.streams = lam_ ? 2 : 1;
  set_memory(p, state, memory);
  set_rule(p, memory);
  p.bank_distance = memory.bank_distance.value_or(0);
  p.theta_interleaved = interleaved(attention.theta_pairs);
  p.gate_bias = memory.gate_bias;
  p.mass_bias = memory.mass_bias;
  p.scale = scale_of(attention, p.dim);
  p.norm_eps = attention.norm_eps;
  p.q = read(q);
  p.k = read(k);
  p.v = read(v);
  p.lam = read(lam);
  p.theta = read(theta);
  p.norm_weight = read(norm_weight);
  p.gate = read(gate);
  p.eta_logit = read(eta_logit);
  p.inv_freq = read<double>(inv_freq);
  p.state_k = data(state.k);
  p.state_v = data(state.v);
  p.state_gate = data(state.gate);
  p.exact_pos = data<int64_t>(state.exact_pos);
  p.tokens_seen = data<int64_t>(state.tokens_seen);
  p.last_touch = data<int64_t>(state.last_touch);
  p.counts = data<int64_t>(state.counts);
  p.summary_k = data(state.summary_k);
  p.summary_v = data(state.summary_v);
  p.summary_mass = data(state.summary_mass);
  p.y = data(y);
  const auto dtype = dtype_of(q);
  const auto scratch = workspace(kernels::decode_step_workspace(p, dtype), q);
  const bool turns = p.summary_slots > 0 && p.has_bank_distance;
  const auto turned = at::empty({turns ? p.sequences : 0, p.chunk, p.kv_heads, p.dim}, k.options());
  p.workspace = data(scratch);
  p.bank_keys = data(turned);
  C10_CUDA_CHECK(kernels::decode_step(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) { m.impl("decode_step_", decode_step_); }

}  // namespace coda::cuda
