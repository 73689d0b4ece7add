#include "../common/launch.cuh"
#include "../common/ring.cuh"
#include "../common/rotation.cuh"
#include "../common/sequences.cuh"
#include "launch.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWidened = 8 * kThreads;  // elements of a block
constexpr int kLanes = kWarp / 2;       // of a row: two rows of a warp are under way at once
constexpr int kPairs = 4;               // of a lane

struct PrepareParams : BoundedAttentionPrepare {
  int64_t lam_blocks, theta_blocks;
};

template <class T>
__device__ inline void widen_block(const void* from, void* to, int64_t block, int64_t count) {
#pragma unroll
  for (int i = 0; i < kWidened / kThreads; ++i) {
    const int64_t at = block * kWidened + i * kThreads + threadIdx.x;
    if (at < count) static_cast<acc_t<T>*>(to)[at] = widen(static_cast<const T*>(from)[at]);
  }
}

// turn_back_row by half a warp, and a plain copy where nothing turns.
template <class T>
__device__ inline void bank_key(T* to, const T* from, int dim, bool turns, int64_t position, const double* inv_freq, bool interleaved) {
  using A = acc_t<T>;
#pragma unroll 1
  for (int base = lane_id() % kLanes; base < dim / 2; base += kLanes * kPairs) {
    A a[kPairs], b[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int i = min(base + j * kLanes, dim / 2 - 1);
      a[j] = widen(from[first_of_pair(i, interleaved)]);
      b[j] = widen(from[second_of_pair(i, dim, interleaved)]);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int i = base + j * kLanes;
      if (i >= dim / 2) break;
      if (turns) turn_pair(a[j], b[j], rope_angle<A>(-position, inv_freq[i]));
      to[first_of_pair(i, interleaved)] = narrow<T>(a[j]);
      to[second_of_pair(i, dim, interleaved)] = narrow<T>(b[j]);
    }
  }
}

// The first blocks widen lam and theta. Then a warp for each chunk row, gate group and share of the slots: it finds which tokens they
// hold that the row before did not, and brings their keys into the form of the bank. A token fills a slot once, so each comes about
// once. What comes in one chunk tends to lie in slots side by side, so a share takes every parts-th slot.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(PrepareParams p) {
  int64_t block = blockIdx.x;
  if (block < p.lam_blocks) return widen_block<T>(p.narrow_lam, p.wide_lam, block, p.tokens * p.heads);
  block -= p.lam_blocks;
  if (block < p.theta_blocks) return widen_block<T>(p.narrow_theta, p.wide_theta, block, static_cast<int64_t>(p.heads) * (p.dim / 2));
  block -= p.theta_blocks;
  const int parts = (p.exact_slots + kLanes - 1) / kLanes, warp = static_cast<int>(block) * (kThreads / kWarp) + warp_id();
  const int at = warp / parts, row = at / p.gate_groups, group = at % p.gate_groups;
  if (row >= p.chunk_rows) return;
  const int slot = warp % parts + lane_id() % kLanes * parts;
  // Half of the lanes look at this row, half at the one before.
  const bool earlier = lane_id() >= kLanes;
  int source = -1;
  if (slot < p.exact_slots && (!earlier || row > 0)) {
    source = p.index[static_cast<int64_t>(at - (earlier ? p.gate_groups : 0)) * p.exact_slots + slot];
  }
  const int n = find_sequence_together(p.sequences, row, [&](int m) { return static_cast<int>(p.cu_seqlens[m]) / p.chunk + 2 * m; });
  const int token0 = static_cast<int>(p.cu_seqlens[n]), held = p.window + p.exact_slots;
  const int64_t first = p.tokens_seen[n];
  const int before = __shfl_xor_sync(kAllLanes, source, kLanes);
  const bool begins = row == token0 / p.chunk + 2 * n;
  unsigned arrivals = __ballot_sync(kAllLanes, !earlier && source >= 0 && (begins || source != before));
  const int heads = p.gate_groups == 1 ? p.kv_heads : 1;
#pragma unroll 1
  for (; arrivals != 0; arrivals &= arrivals - 1) {
    const int one = __ffs(arrivals) - 1;
    const bool pair = heads == 1 && (arrivals & (arrivals - 1)) != 0;  // else both halves of the warp have the same token
    if (pair) arrivals &= arrivals - 1;
    const int other = __ffs(arrivals) - 1;
    const int from = __shfl_sync(kAllLanes, source, earlier ? other : one);
    const bool fresh = from >= held;
    const int64_t position = fresh ? first + from - held : ring_position(first, from, p.window);
    const void* rows_from = fresh ? p.k : p.state_k;
    void* rows_to = fresh ? p.new_kbar : p.new_state_kbar;
#pragma unroll 1
    for (int h = pair ? 0 : earlier; h < heads; h += pair ? 1 : 2) {
      const int head = p.gate_groups == 1 ? h : group;
      const int64_t at_row = fresh ? static_cast<int64_t>(token0 + from - held) * p.kv_heads + head
                                   : (static_cast<int64_t>(n) * p.kv_heads + head) * held + from;
      bank_key(static_cast<T*>(rows_to) + at_row * p.dim, static_cast<const T*>(rows_from) + at_row * p.dim, p.dim,
               fresh || from < p.window, position, p.inv_freq, p.rope_interleaved);
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t bounded_attention_prepare(const BoundedAttentionPrepare& params, DType dtype, cudaStream_t stream) {
  const auto blocks = [](const void* from, int64_t count) { return from ? (count + kWidened - 1) / kWidened : 0; };
  const PrepareParams p{params, blocks(params.narrow_lam, params.tokens * params.heads),
                        blocks(params.narrow_theta, static_cast<int64_t>(params.heads) * (params.dim / 2))};
  const int64_t warps = params.new_kbar ? params.chunk_rows * params.gate_groups * ((params.exact_slots + kLanes - 1) / kLanes) : 0;
  const int64_t rows = (warps + kThreads / kWarp - 1) / (kThreads / kWarp);
  return dispatch(dtype, [&](auto zero) {
    return launch(prepare_kernel<decltype(zero)>, dim3(static_cast<unsigned>(p.lam_blocks + p.theta_blocks + rows)), kThreads, 0,
                         stream, p);
  });
}

}  // namespace coda::kernels
