#include "../common/attention_rows.cuh"
#include "../common/launch.cuh"
#include "../common/ring.cuh"
#include "steps.h"

namespace coda::kernels {
namespace {

// A block takes kLines lines of one sequence and KV head; its warps share out the slots, 32 at a time, and their softmax states are
// merged in the order of the warps.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) attend_kernel(DecodeStepParams p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), kv_head = blockIdx.y, group = p.heads / p.kv_heads;
  const int rows = rows_per_warp(p.streams);
  const int tiles = (group + rows - 1) / rows;
  const int64_t n = blockIdx.x / tiles;
  const int row0 = static_cast<int>(blockIdx.x % tiles) * rows;
  A* ring_lines = reinterpret_cast<A*>(shared);
  A* bank_lines = ring_lines + kLines * stride;
  A* partial = bank_lines + kLines * stride;  // (warps, kLines, stride)
  auto* angles = reinterpret_cast<Angle<A>*>(partial + warp_count() * kLines * stride);
  __shared__ A peaks[8][kLines], totals[8][kLines];

  const int64_t position = p.tokens_seen[n], start = position / p.chunk * p.chunk;
  if (p.has_bank_distance) {
    for (int i = threadIdx.x; i < dim / 2; i += blockDim.x) angles[i] = rope_angle<A>(p.bank_distance - start, p.inv_freq[i]);
  }
  __syncthreads();
  for (int l = warp_id(); l < 2 * kLines; l += warp_count()) {
    const int row = row0 + l % kLines % rows, head = kv_head * group + row;
    const bool real = row < group, second = l % kLines >= rows;
    load_row(ring_lines + l * stride, real ? static_cast<const T*>(p.q) + (n * p.heads + head) * dim : nullptr, dim);
    turn_query(ring_lines + l * stride, dim,
               QueryTurn<A>{l >= kLines && p.has_bank_distance ? angles : nullptr, p.rope_interleaved,
                            real && second ? static_cast<const A*>(p.theta) + head * (dim / 2) : nullptr, p.theta_interleaved});
  }
  __syncthreads();

  const int held = p.window + p.exact_slots, gate_group = p.gate_groups == 1 ? 0 : kv_head;
  const int64_t state0 = (n * p.kv_heads + kv_head) * held, summary0 = (n * p.kv_heads + kv_head) * p.summary_slots;
  const int64_t window_begin = max(int64_t{0}, start - (p.window - p.chunk));
  const int new_slot = static_cast<int>(position % p.window);
  // The bias of a slot, -inf where the query does not see it.
  const auto bias_of = [&](int slot) -> A {
    if (slot < p.window) {
      return ring_position(position + 1, slot, p.window) >= window_begin ? A(0) : neg_inf<A>();
    }
    if (slot < held) {
      const int j = slot - p.window;
      if (p.exact_pos[(n * p.gate_groups + gate_group) * p.exact_slots + j] < 0) return neg_inf<A>();
      if (!p.gate_bias || j < p.num_sinks) return A(0);
      return log_sigmoid(static_cast<const A*>(p.state_gate)[(n * p.gate_groups + gate_group) * held + slot]);
    }
    if (slot >= held + p.summary_slots) return neg_inf<A>();
    const A mass = static_cast<const A*>(p.summary_mass)[n * p.summary_slots + slot - held];
    if (!(mass > A(0))) return neg_inf<A>();
    return p.mass_bias ? log(mass) : A(0);
  };
  // Elements lane, lane + 32, ... of a slot's key or value.
  const auto load = [&](A(&x)[kVec], int slot, const void* state, const void* fresh, const void* summary) {
    if (slot >= held) {
      const A* row = static_cast<const A*>(summary) + (summary0 + slot - held) * dim;
      for_elements(dim, [&](int i, int d) { x[i] = row[d]; });
    } else {
      const T* row = slot == new_slot ? static_cast<const T*>(fresh) + (n * p.kv_heads + kv_head) * dim
                                      : static_cast<const T*>(state) + (state0 + slot) * dim;
      for_elements(dim, [&](int i, int d) { x[i] = widen(row[d]); });
    }
  };
  RowState<A> state;
  for (int base = warp_id() * kWarp; base < held + p.summary_slots; base += warp_count() * kWarp) {
    const A bias = bias_of(base + lane_id());
    const unsigned seen = __ballot_sync(kAllLanes, bias > neg_inf<A>());
    if (seen == 0) continue;
    A weight[kLines];
    for (int j = 0; j < kWarp; ++j) {
      if (!(seen >> j & 1)) continue;
      A x[kVec] = {};
      load(x, base + j, p.state_k, p.k, p.summary_k);
      const A* lines = base + j < p.window ? ring_lines : bank_lines;
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        A dot = A(0);
        for_elements(dim, [&](int i, int d) { dot += lines[l * stride + d] * x[i]; });
        dot = warp_sum(dot);
        if (lane_id() == j) weight[l] = dot * static_cast<A>(p.scale) + bias;
      }
    }
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      if (!(bias > neg_inf<A>())) weight[l] = neg_inf<A>();
    }
    absorb_logits(state, weight);
    for (int j = 0; j < kWarp; ++j) {
      if (!(seen >> j & 1)) continue;
      A x[kVec] = {};
      load(x, base + j, p.state_v, p.v, p.summary_v);
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        const A share = __shfl_sync(kAllLanes, weight[l], j);
#pragma unroll
        for (int i = 0; i < kVec; ++i) state.out[l][i] += share * x[i];
      }
    }
  }
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    for_elements(dim, [&](int i, int d) { partial[(warp_id() * kLines + l) * stride + d] = state.out[l][i]; });
    if (lane_id() == 0) {
      peaks[warp_id()][l] = state.peak[l];
      totals[warp_id()][l] = state.total[l];
    }
  }
  __syncthreads();
  const auto merge = [&](A(&out)[kVec], int l) {
    A peak = neg_inf<A>(), total = A(0);
    for (int w = 0; w < warp_count(); ++w) peak = max(peak, peaks[w][l]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = A(0);
    const A base = peak == neg_inf<A>() ? A(0) : peak;
    for (int w = 0; w < warp_count(); ++w) {
      const A shrink = exp(peaks[w][l] - base);
      total += totals[w][l] * shrink;
      for_elements(dim, [&](int i, int d) { out[i] += partial[(w * kLines + l) * stride + d] * shrink; });
    }
    const A inverse = total == A(0) ? A(0) : A(1) / total;
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] *= inverse;
  };
  const RowOutputs<T> to{static_cast<T*>(p.y), nullptr, nullptr, nullptr, static_cast<const A*>(p.lam),
                         static_cast<const A*>(p.norm_weight), static_cast<A>(p.norm_eps)};
  for (int r = warp_id(); r < rows && row0 + r < group; r += warp_count()) {
    A o1[kVec], o2[kVec];
    merge(o1, r);
    merge(o2, (r + rows) % kLines);
    finish_row<T>(to, o1, o2, n * p.heads + kv_head * group + row0 + r, dim);
  }
}

// One block for each sequence.
template <class T>
__global__ void write_ring_kernel(DecodeStepParams p) {
  using A = acc_t<T>;
  const int64_t n = blockIdx.x, position = p.tokens_seen[n];
  const int slot = static_cast<int>(position % p.window), held = p.window + p.exact_slots;
  for (int item = threadIdx.x; item < p.kv_heads * p.dim; item += blockDim.x) {
    const int64_t from = n * p.kv_heads * p.dim + item;
    const int64_t to = ((n * p.kv_heads + item / p.dim) * held + slot) * p.dim + item % p.dim;
    static_cast<T*>(p.state_k)[to] = static_cast<const T*>(p.k)[from];
    static_cast<T*>(p.state_v)[to] = static_cast<const T*>(p.v)[from];
  }
  for (int r = threadIdx.x; r < p.gate_groups; r += blockDim.x) {
    static_cast<A*>(p.state_gate)[(n * p.gate_groups + r) * held + slot] =
        static_cast<const A*>(p.gate)[n * p.gate_groups + r];
  }
  __syncthreads();
  if (threadIdx.x == 0) p.tokens_seen[n] = position + 1;
}

}  // namespace

cudaError_t attend_memory(const DecodeStepParams& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const size_t fixed = row_bytes<A>(params.dim, 2 * kLines) + params.dim * sizeof(A), warp = row_bytes<A>(params.dim, kLines);
    const int warps = fit_warps(fixed, warp), rows = rows_per_warp(params.streams);
    const int64_t blocks = params.sequences * ((params.heads / params.kv_heads + rows - 1) / rows);
    return launch(attend_kernel<T>, dim3(static_cast<unsigned>(blocks), params.kv_heads), warps * kWarp, fixed + warps * warp,
                  stream, params);
  });
}

cudaError_t write_ring(const DecodeStepParams& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    return launch(write_ring_kernel<decltype(zero)>, dim3(static_cast<unsigned>(params.sequences)), 256, 0, stream, params);
  });
}

}  // namespace coda::kernels
