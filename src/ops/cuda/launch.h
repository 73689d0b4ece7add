#pragma once

// What the CUDA ops have in common: tensors into the plain pointers and numbers that kernels take.

#include <algorithm>
#include <cmath>
#include <optional>

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <kernels/common/bank_keys.h>
#include <kernels/common/dtype.h>
#include <kernels/common/output_gradient.h>

#include <coda/options.h>
#include <coda/state.h>

#include "../host.h"

namespace coda::cuda {

inline kernels::DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kernels::DType::kFloat32;
    case at::kDouble: return kernels::DType::kFloat64;
    case at::kBFloat16: return kernels::DType::kBFloat16;
    case at::kHalf: return kernels::DType::kFloat16;
    default: TORCH_CHECK_VALUE(false, t.scalar_type(), " is not supported; use float16, bfloat16, float32 or float64");
  }
}

// The accumulation type.
inline at::ScalarType wide_type(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
inline at::TensorOptions wide(const at::Tensor& t) { return t.options().dtype(wide_type(t)); }

// Contiguous, in the accumulation type of `like`; undefined where absent.
inline at::Tensor widened(const std::optional<at::Tensor>& t, const at::Tensor& like) {
  return t ? t->to(wide_type(like)).contiguous() : at::Tensor();
}

inline at::Tensor int64(const at::Tensor& t) { return t.to(at::kLong).contiguous(); }

// Null for an absent or empty tensor.
inline void* data(const at::Tensor& t) { return t.defined() && t.numel() > 0 ? t.data_ptr() : nullptr; }
inline const void* read(const at::Tensor& t) { return t.defined() && t.numel() > 0 ? t.const_data_ptr() : nullptr; }
template <class T>
T* data(const at::Tensor& t) {
  return static_cast<T*>(data(t));
}
template <class T>
const T* read(const at::Tensor& t) {
  return static_cast<const T*>(read(t));
}

// cu_seqlens (N + 1), int64 and contiguous, or (0) where sequences are of one length.
inline kernels::SequenceEnds sequence_ends(const at::Tensor& cu_seqlens, int64_t tokens, int64_t sequences) {
  return {read<int64_t>(cu_seqlens), tokens / sequences};
}

// Params of one kernel from what an op's kernels share; the rest is zero.
template <class Params, class Shared>
Params with_outputs(const Shared& shared) {
  Params params{};
  static_cast<Shared&>(params) = shared;
  return params;
}

inline at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

inline bool interleaved(Pairs pairs) { return pairs == Pairs::kInterleaved; }

// The memory as every kernel that reads it knows it.
template <class Params>
void set_memory(Params& p, const State& state, const MemoryOptions& memory) {
  p.gate_groups = static_cast<int>(state.gate.size(1));
  p.window = static_cast<int>(memory.window);
  p.chunk = static_cast<int>(memory.chunk);
  p.exact_slots = static_cast<int>(state.exact_pos.size(2));
  p.summary_slots = static_cast<int>(state.summary_mass.size(1));
  p.num_sinks = static_cast<int>(memory.num_sinks);
  p.has_bank_distance = memory.bank_distance.has_value();
  p.rope_interleaved = interleaved(memory.rope_pairs);
}
// How it decides what to keep.
template <class Params>
void set_rule(Params& p, const MemoryOptions& memory) {
  p.novelty = memory.policy == Policy::kNoveltyLru;
  p.refresh_on_hit = memory.refresh_on_hit;
  p.low_freq_key = memory.summary_routing == SummaryRouting::kLowFreqKey;
  p.exact_candidates = static_cast<int>(std::min(memory.exact_candidates, memory.chunk));
  p.age_decay = memory.age_decay;
  p.exact_threshold = logit(memory.tau_exact);
  p.summary_threshold = logit(memory.tau_summary);
  p.tau_novel = memory.tau_novel;
  p.tau_match = memory.tau_match;
  p.tau_spawn = memory.tau_spawn;
}

inline double scale_of(const AttentionOptions& options, int64_t dim) {
  return options.scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
}

// New and carried keys as the banks hold them (semantics 3.7): (T, Hkv, D) and (N, Hkv, W + Me, D). `k`, `state`,
// `cu_seqlens` (int64) and `inv_freq` are contiguous; without bank_distance the keys themselves.
struct BankKeys {
  at::Tensor fresh, state;
};
inline BankKeys bank_keys(const at::Tensor& k, const State& state, const at::Tensor& cu_seqlens, const at::Tensor& inv_freq,
                          const MemoryOptions& memory) {
  if (!memory.bank_distance) return {k, state.k};
  BankKeys turned{at::empty_like(k), at::empty_like(state.k)};
  kernels::BankKeysParams p{};
  p.tokens = k.size(0);
  p.sequences = state.k.size(0);
  p.kv_heads = static_cast<int>(k.size(1));
  p.dim = static_cast<int>(k.size(2));
  p.window = static_cast<int>(memory.window);
  p.exact_slots = static_cast<int>(state.exact_pos.size(2));
  p.interleaved = interleaved(memory.rope_pairs);
  p.k = read(k);
  p.state_k = read(state.k);
  p.cu_seqlens = sequence_ends(cu_seqlens, p.tokens, p.sequences);
  p.tokens_seen = read<int64_t>(state.tokens_seen);
  p.inv_freq = read<double>(inv_freq);
  p.kbar = data(turned.fresh);
  p.state_kbar = data(turned.state);
  C10_CUDA_CHECK(kernels::bank_keys(p, dtype_of(k), c10::cuda::getCurrentCUDAStream()));
  return turned;
}

// The gradient of o1 - lam o2 and what else of the backward precedes the softmaxes. All tensors contiguous, lam and
// norm_weight in the accumulation type or undefined.
struct OutputGradient {
  at::Tensor grad_diff;         // like y
  at::Tensor delta;             // (streams, T, H), with what follows in the accumulation type
  at::Tensor grad_norm_weight;  // (D), or of size 0 without norm
  at::Tensor grad_lam;          // (T, H), or of size 0 with one stream
};
inline OutputGradient output_gradient(const at::Tensor& grad_y, const at::Tensor& y, const at::Tensor& o2,
                                      const at::Tensor& diff, const at::Tensor& lam, const at::Tensor& norm_weight,
                                      double norm_eps) {
  const auto options = wide(y);
  const int64_t heads = y.size(-2), dim = y.size(-1), rows = y.numel() / dim, tokens = rows / heads;
  const int64_t blocks = kernels::output_gradient_blocks(tokens, static_cast<int>(heads));
  OutputGradient result{norm_weight.defined() ? at::empty(y.sizes(), y.options()) : grad_y,
                        at::empty({lam.defined() ? 2 : 1, tokens, heads}, options), at::empty({0}, options),
                        at::empty({0}, options)};
  const auto partial = at::empty({norm_weight.defined() ? blocks : 0, dim}, options);
  kernels::OutputGradientParams p{};
  p.tokens = tokens;
  p.heads = static_cast<int>(heads);
  p.dim = static_cast<int>(dim);
  p.norm_eps = norm_eps;
  p.grad_y = read(grad_y);
  p.y = read(y);
  p.o2 = read(o2);
  p.diff = read(diff);
  p.lam = read(lam);
  p.norm_weight = read(norm_weight);
  p.grad_diff = norm_weight.defined() ? data(result.grad_diff) : nullptr;
  p.delta = data(result.delta);
  p.weight_partial = data(partial);
  C10_CUDA_CHECK(kernels::output_gradient(p, dtype_of(y), c10::cuda::getCurrentCUDAStream()));
  if (norm_weight.defined()) result.grad_norm_weight = partial.sum(0);
  if (lam.defined()) result.grad_lam = result.delta.select(0, 1).neg();
  return result;
}

// A gradient in the dtype and shape of its tensor; of size 0 where that is absent.
inline at::Tensor gradient_like(const at::Tensor& gradient, const std::optional<at::Tensor>& t) {
  return t ? gradient.to(t->scalar_type()).view(t->sizes()) : gradient;
}

}  // namespace coda::cuda
