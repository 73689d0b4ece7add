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

// The first blocks widen lam and theta. Then a block for each chunk row and gate group: it finds which tokens its slots hold that the
// row before did not, and brings their keys into the form of the bank. A token fills a slot once, so each comes about once.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(PrepareParams p) {
  __shared__ int arrived[kThreads];
  __shared__ int arrivals;
  let_next_launch_come();
  wait_for_previous_launch();
  int64_t block = blockIdx.x;
  if (block < p.lam_blocks) return widen_block<T>(p.narrow_lam, p.wide_lam, block, p.tokens * p.heads);
  block -= p.lam_blocks;
  if (block < p.theta_blocks) return widen_block<T>(p.narrow_theta, p.wide_theta, block, static_cast<int64_t>(p.heads) * (p.dim / 2));
  block -= p.theta_blocks;
  const int64_t row = block / p.gate_groups;
  const int group = static_cast<int>(block % p.gate_groups), heads = p.gate_groups == 1 ? p.kv_heads : 1;
  const int n = find_sequence_together(p.sequences, row, [&](int m) { return p.cu_seqlens[m] / p.chunk + 2 * m; });
  const Span span(p.cu_seqlens, p.tokens_seen, n, p.chunk);
  const int held = p.window + p.exact_slots;
  const int32_t* index = p.index + block * p.exact_slots;
  for (int slot0 = 0; slot0 < p.exact_slots; slot0 += kThreads) {
    const int slot = slot0 + static_cast<int>(threadIdx.x);
    int source = -1, before = -1;
    if (slot < p.exact_slots) {
      source = index[slot];
      if (row > span.row0) before = index[slot - static_cast<int64_t>(p.gate_groups) * p.exact_slots];
    }
    if (threadIdx.x == 0) arrivals = 0;
    __syncthreads();
    const bool arrives = source >= 0 && source != before;
    const unsigned mask = __ballot_sync(kAllLanes, arrives);
    int at = 0;
    if (mask != 0 && lane_id() == 0) at = atomicAdd(&arrivals, __popc(mask));
    at = __shfl_sync(kAllLanes, at, 0) + __popc(mask & ((1u << lane_id()) - 1));
    if (arrives) arrived[at] = source;
    __syncthreads();
    const int rows = arrivals * heads;
    for (int i = threadIdx.x / kLanes; i < rows; i += kThreads / kLanes) {
      const int from = arrived[i / heads], kv_head = p.gate_groups == 1 ? i % heads : group;
      const bool fresh = from >= held;
      const int64_t at_row = fresh ? (span.token0 + from - held) * p.kv_heads + kv_head
                                   : (static_cast<int64_t>(n) * p.kv_heads + kv_head) * held + from;
      const int64_t position = fresh ? span.first + from - held : ring_position(span.first, from, p.window);
      const void* rows_from = fresh ? p.k : p.state_k;
      void* rows_to = fresh ? p.new_kbar : p.new_state_kbar;
      bank_key(static_cast<T*>(rows_to) + at_row * p.dim, static_cast<const T*>(rows_from) + at_row * p.dim, p.dim,
               fresh || from < p.window, position, p.inv_freq, p.rope_interleaved);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t bounded_attention_prepare(const BoundedAttentionPrepare& params, DType dtype, cudaStream_t stream) {
  const auto blocks = [](const void* from, int64_t count) { return from ? (count + kWidened - 1) / kWidened : 0; };
  const PrepareParams p{params, blocks(params.narrow_lam, params.tokens * params.heads),
                        blocks(params.narrow_theta, static_cast<int64_t>(params.heads) * (params.dim / 2))};
  const int64_t rows = params.new_kbar ? params.chunk_rows * params.gate_groups : 0;
  return dispatch(dtype, [&](auto zero) {
    return launch_behind(prepare_kernel<decltype(zero)>, dim3(static_cast<unsigned>(p.lam_blocks + p.theta_blocks + rows)), kThreads, 0,
                         stream, p);
  });
}

}  // namespace coda::kernels
