#include "../common/launch.cuh"
#include "../common/ring.cuh"
#include "../common/rotation.cuh"
#include "../common/sequences.cuh"
#include "steps.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWidened = 8 * kThreads;  // elements of a block
constexpr int kEntries = 2 * kThreads;  // of the index, looked at together
constexpr int kLanes = 8;               // of a row: four rows of a warp are under way at once
constexpr int kPairs = 4;               // of a lane at once
constexpr size_t kTableLimit = 40 * 1024;

struct PrepareParams : BoundedAttentionPrepare {
  int64_t lam_blocks, theta_blocks;
  int splits;        // blocks of a chunk row
  int table_tokens;  // whose angles a block keeps, those t of the chunk with t % splits its number; 0 where they do not fit
};

template <class T>
__device__ inline void widen_block(const void* from, void* to, int64_t block, int64_t count) {
#pragma unroll
  for (int i = 0; i < kWidened / kThreads; ++i) {
    const int64_t at = block * kWidened + i * kThreads + threadIdx.x;
    if (at < count) static_cast<acc_t<T>*>(to)[at] = widen(static_cast<const T*>(from)[at]);
  }
}

// turn_back_row by some lanes with angles of one token, and a plain copy where nothing turns.
template <class T, class AngleOf>
__device__ inline void bank_key(T* to, const T* from, int dim, bool turns, bool interleaved, AngleOf angle) {
#pragma unroll 1
  for (int base = lane_id() % kLanes; base < dim / 2; base += kLanes * kPairs) {
    acc_t<T> a[kPairs], b[kPairs];
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
      if (turns) turn_pair(a[j], b[j], angle(i));
      to[first_of_pair(i, interleaved)] = narrow<T>(a[j]);
      to[second_of_pair(i, dim, interleaved)] = narrow<T>(b[j]);
    }
  }
}

// The first blocks widen lam and theta. Then one or more blocks for each chunk row: they find which tokens the slots hold that
// they did not hold in the row before, and bring their keys into the form of the bank. A token fills a slot once, so each comes about
// once. What comes are tokens of the chunk that leaves the ring, mostly, in several gate groups and heads: their angles are
// computed once.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) prepare_kernel(PrepareParams p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int pairs = p.dim / 2;
  auto* table = reinterpret_cast<Angle<A>*>(shared);  // (table_tokens, D/2)
  __shared__ int arrived_source[kEntries];
  __shared__ short arrived_group[kEntries], arrived_entry[kEntries];  // of the table, -1 without
  __shared__ int arrivals;
  // In this order: the attention, which may start from here on, takes what was there before for complete.
  wait_for_stream();
  let_next_start();
  if (p.claims && blockIdx.x == 0 && threadIdx.x == 0) *p.claims = 0;
  int64_t block = blockIdx.x;
  if (block < p.lam_blocks) return widen_block<T>(p.narrow_lam, p.wide_lam, block, p.tokens * p.heads);
  block -= p.lam_blocks;
  if (block < p.theta_blocks) return widen_block<T>(p.narrow_theta, p.wide_theta, block, int64_t{p.heads} * pairs);
  block -= p.theta_blocks;
  const int row = static_cast<int>(block) / p.splits, split = static_cast<int>(block) % p.splits;
  const auto row_start = [&](int m) { return static_cast<int>(p.cu_seqlens[m]) / p.chunk + 2 * m; };
  const int n = find_sequence_together(p.sequences, row, row_start);
  const int token0 = static_cast<int>(p.cu_seqlens[n]), held = p.window + p.exact_slots;
  const int64_t first = p.tokens_seen[n];
  const int i = row - row_start(n);
  const int64_t leaves = (first / p.chunk + i) * p.chunk - p.window;  // the first position that leaves the ring at this row
  const int slots = p.gate_groups * p.exact_slots;
  const int32_t* index = p.index + static_cast<int64_t>(row) * slots;
  const auto position_of = [&](int source) {
    return source >= held ? first + source - held : ring_position(first, source, p.window);
  };
#pragma unroll 1
  for (int slot0 = 0; slot0 < slots; slot0 += kEntries) {
    int source[kEntries / kThreads], before[kEntries / kThreads];
#pragma unroll
    for (int e = 0; e < kEntries / kThreads; ++e) {
      const int slot = slot0 + e * kThreads + static_cast<int>(threadIdx.x);
      source[e] = slot < slots ? index[slot] : -1;
      before[e] = slot < slots && i > 0 ? index[slot - slots] : -1;
    }
    if (threadIdx.x == 0) arrivals = 0;
    if (slot0 == 0) {  // while the index comes
#pragma unroll 1
      for (int item = threadIdx.x; item < p.table_tokens * pairs; item += kThreads) {
        const int entry = item / pairs;
        table[item] = rope_angle<A>(-(leaves + entry * p.splits + split), p.inv_freq[item - entry * pairs]);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int e = 0; e < kEntries / kThreads; ++e) {
      const int from = source[0], slot = slot0 + e * kThreads + static_cast<int>(threadIdx.x);
      const bool arrives = from >= 0 && from != before[0];
      source[0] = source[1];
      before[0] = before[1];
      if (!arrives) continue;
      const int64_t token = from < p.window || from >= held ? position_of(from) - leaves : -1;
      const bool tabled = p.table_tokens > 0 && token >= 0 && token < p.chunk;
      const int owner = tabled ? static_cast<int>(token) : slot, entry = owner / p.splits;
      if (owner - entry * p.splits != split) continue;
      const int at = atomicAdd(&arrivals, 1);
      arrived_source[at] = from;
      arrived_group[at] = static_cast<short>(slot / p.exact_slots);
      arrived_entry[at] = static_cast<short>(tabled ? entry : -1);
    }
    __syncthreads();
    const int heads = p.gate_groups == 1 ? p.kv_heads : 1, rows = arrivals * heads;
#pragma unroll 1
    for (int r = threadIdx.x / kLanes; r < rows; r += kThreads / kLanes) {
      const int at = r / heads, from = arrived_source[at], head = p.gate_groups == 1 ? r - at * heads : arrived_group[at];
      const bool fresh = from >= held;
      const int64_t at_row = fresh ? static_cast<int64_t>(token0 + from - held) * p.kv_heads + head
                                   : (static_cast<int64_t>(n) * p.kv_heads + head) * held + from;
      const T* key = static_cast<const T*>(fresh ? p.k : p.state_k) + at_row * p.dim;
      T* to = static_cast<T*>(fresh ? p.new_kbar : p.new_state_kbar) + at_row * p.dim;
      const bool turns = fresh || from < p.window;
      const int entry = arrived_entry[at];
      if (!turns || entry >= 0) {
        bank_key(to, key, p.dim, turns, p.rope_interleaved, [&](int pair) { return table[entry * pairs + pair]; });
      } else {
        const int64_t position = position_of(from);
#pragma unroll 1
        for (int pair = lane_id() % kLanes; pair < pairs; pair += kLanes) {
          const int x = first_of_pair(pair, p.rope_interleaved), y = second_of_pair(pair, p.dim, p.rope_interleaved);
          A a = widen(key[x]), b = widen(key[y]);
          turn_pair(a, b, rope_angle<A>(-position, p.inv_freq[pair]));
          to[x] = narrow<T>(a);
          to[y] = narrow<T>(b);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t bounded_attention_prepare(const BoundedAttentionPrepare& params, DType dtype, cudaStream_t stream) {
  if (sm90::prepares_ahead(params, dtype)) return sm90::prepare_ahead(params, dtype, stream);
  const auto blocks = [](const void* from, int64_t count) { return from ? (count + kWidened - 1) / kWidened : 0; };
  PrepareParams p{params, blocks(params.narrow_lam, params.tokens * params.heads),
                  blocks(params.narrow_theta, static_cast<int64_t>(params.heads) * (params.dim / 2)), 1, 0};
  constexpr int64_t kManyBlocks = 128;  // more leave the attention no room to start in
  while (p.splits < 8 && params.chunk_rows * p.splits < kManyBlocks) p.splits *= 2;
  const int64_t rows = params.new_kbar ? params.chunk_rows * p.splits : 0;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const size_t bytes_of_token = p.dim / 2 * sizeof(Angle<acc_t<T>>);
    const int tokens = (p.chunk + p.splits - 1) / p.splits;
    p.table_tokens = tokens * bytes_of_token <= kTableLimit ? tokens : 0;
    return launch_early(prepare_kernel<T>, dim3(static_cast<unsigned>(p.lam_blocks + p.theta_blocks + rows)), kThreads,
                        p.table_tokens * bytes_of_token, stream, p);
  });
}

}  // namespace coda::kernels
