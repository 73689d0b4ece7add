#include "../../common/fragments.cuh"
#include "../../common/hopper.cuh"
#include "../../common/launch.cuh"
#include "../../common/rotation.cuh"
#include "../../common/sequences.cuh"
#include "../steps.h"

#include <algorithm>

namespace coda::kernels::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kCarriedBytes = 32 * 1024;  // that a block copies at once
// Of more blocks the scan does not hide the work, and they have more to turn than comes.
constexpr int64_t kManyBlocks = 128, kMostBlocks = 288;

struct AheadParams : BoundedAttentionPrepare {
  int splits;  // blocks of a chunk row
  int tokens;  // of the chunk that leaves, of a block
  Divisor by_chunk, by_window, by_heads, by_pairs, by_words;  // by_words: two words of a row at a time
};

// The keys of a chunk that leaves the ring, or a share of it, turned back to position 0. Code that runs once costs the time to
// fetch it, so the copy engine brings and takes the rows, and loops stay loops.
template <class T>
__device__ inline void turn_leaving(const AheadParams& p, unsigned char* shared, int row, int split) {
  __shared__ uint64_t arrived;
  const int pairs = p.dim / 2;
  auto* table = reinterpret_cast<Angle<float>*>(shared);                 // (tokens, D/2)
  auto* keys = reinterpret_cast<T*>(table + p.tokens * pairs);           // (tokens, Hkv, D)
  const auto row_start = [&](int m) { return p.by_chunk.quotient(static_cast<int>(p.cu_seqlens[m])) + 2 * m; };
  const int n = find_sequence_together(p.sequences, row, row_start);
  const int token0 = static_cast<int>(p.cu_seqlens[n]), length = static_cast<int>(p.cu_seqlens[n + 1]) - token0;
  const int64_t first = p.tokens_seen[n], begin = (p.by_chunk.quotient(first) + row - row_start(n)) * p.chunk;
  // Nothing leaves yet; or no chunk uses the row; or what leaves at its beginning left in another call.
  if (begin < p.window || begin >= first + length || begin < first) return;
  const int64_t leaves = begin - p.window + split * p.tokens;
  const int rows = min(p.tokens, p.chunk - split * p.tokens) * p.kv_heads, row_bytes = p.dim * static_cast<int>(sizeof(T));
  if (rows <= 0) return;  // a chunk of fewer tokens than blocks
  // Of a row of keys and of where it goes.
  const auto place_of = [&](int r, const void* fresh, const void* carried) {
    const int token = p.by_heads.quotient(r), head = r - token * p.kv_heads, ahead = static_cast<int>(leaves - first) + token;
    const int64_t position = leaves + token;
    const int64_t at = ahead >= 0 ? static_cast<int64_t>(token0 + ahead) * p.kv_heads + head
                                  : (static_cast<int64_t>(n) * p.kv_heads + head) * (p.window + p.exact_slots) + position -
                                        p.by_window.quotient(position) * p.window;
    return static_cast<const char*>(ahead >= 0 ? fresh : carried) + at * row_bytes;
  };
  if (threadIdx.x == 0) {
    hopper::init_barrier(&arrived, 1);
    hopper::fence_barrier_init();
    hopper::arrive_expect(&arrived, rows * row_bytes);
  }
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    hopper::load_bytes(keys + r * p.dim, place_of(r, p.k, p.state_k), &arrived, row_bytes);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens * pairs; i += kThreads) {
    const int token = p.by_pairs.quotient(i);
    table[i] = rope_angle<float>(-(leaves + token), p.inv_freq[i - token * pairs]);
  }
  __syncthreads();
  hopper::wait(&arrived, 0);
  // Two words of a row, with both elements of two pairs.
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (pairs / 2); i += kThreads) {
    const int r = p.by_words.quotient(i), pair = (i - r * (pairs / 2)) * 2;
    auto* word = reinterpret_cast<uint32_t*>(keys + r * p.dim + (p.rope_interleaved ? 2 * pair : pair));
    auto* other = word + (p.rope_interleaved ? 1 : pairs / 2);
    float2 a = unpack<T>(*word), b = unpack<T>(*other);
    if (!p.rope_interleaved) {
      const float x = a.y;
      a.y = b.x;
      b.x = x;
    }
    const float4 by = *reinterpret_cast<const float4*>(table + p.by_heads.quotient(r) * pairs + pair);
    turn_pair(a.x, a.y, Angle<float>{by.x, by.y});
    turn_pair(b.x, b.y, Angle<float>{by.z, by.w});
    if (!p.rope_interleaved) {
      const float x = a.y;
      a.y = b.x;
      b.x = x;
    }
    *word = pack<T>(a.x, a.y);
    *other = pack<T>(b.x, b.y);
  }
  hopper::fence_async_proxy();
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    hopper::store_bytes(const_cast<char*>(place_of(r, p.new_kbar, p.new_state_kbar)), keys + r * p.dim, row_bytes);
  }
  hopper::commit_stores();
  hopper::wait_stores();
}

// What a sequence came with in its exact slots of one KV head: turned already.
__device__ inline void copy_carried(const AheadParams& p, unsigned char* shared, int row, int slot_bytes) {
  __shared__ uint64_t arrived;
  if (threadIdx.x > 0 || p.tokens_seen[row / p.kv_heads] == 0) return;
  hopper::init_barrier(&arrived, 1);
  hopper::fence_barrier_init();
  const int64_t at = (static_cast<int64_t>(row) * (p.window + p.exact_slots) + p.window) * slot_bytes;
  const int all = p.exact_slots * slot_bytes;
  uint32_t parity = 0;
  for (int done = 0; done < all; done += kCarriedBytes, parity ^= 1) {
    const int bytes = min(all - done, kCarriedBytes);
    hopper::arrive_expect(&arrived, bytes);
    hopper::load_bytes(shared, static_cast<const char*>(p.state_k) + at + done, &arrived, bytes);
    hopper::wait(&arrived, parity);
    hopper::store_bytes(static_cast<char*>(p.new_state_kbar) + at + done, shared, bytes);
    hopper::commit_stores();
    hopper::wait_stores();
  }
}

// Blocks for the chunk rows, then for each sequence and KV head. They wait for nothing (README.md, Ahead of the index), and
// leave the multiprocessors to the attention while the scan still runs: the first one alone stays, so that this kernel ends
// after the scan.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) prepare_ahead_kernel(AheadParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_start();
  const int block = static_cast<int>(blockIdx.x), carried = block - static_cast<int>(p.chunk_rows) * p.splits;
  if (p.claims && block == 0 && threadIdx.x == 0) *p.claims = 0;
  if (carried < 0) {
    const int row = block / p.splits;
    turn_leaving<T>(p, shared, row, block - row * p.splits);
  } else {
    copy_carried(p, shared, carried, p.dim * static_cast<int>(sizeof(T)));
  }
  if (block == 0) wait_for_stream();
}

AheadParams arranged(const BoundedAttentionPrepare& params) {
  AheadParams p{};
  static_cast<BoundedAttentionPrepare&>(p) = params;
  p.splits = 1;
  while (p.splits < 8 && p.chunk_rows * p.splits < kManyBlocks) p.splits *= 2;
  p.tokens = (p.chunk + p.splits - 1) / p.splits;
  p.by_chunk = Divisor(p.chunk);
  p.by_window = Divisor(p.window);
  p.by_heads = Divisor(p.kv_heads);
  p.by_pairs = Divisor(p.dim / 2);
  p.by_words = Divisor(p.dim / 4);
  return p;
}
int64_t blocks(const AheadParams& p) { return p.chunk_rows * p.splits + p.sequences * p.kv_heads; }
size_t shared_bytes(const AheadParams& p) {
  constexpr size_t kElement = 2;
  const size_t turning = p.tokens * p.dim * (p.kv_heads * kElement + sizeof(Angle<float>) / 2);
  return std::max(turning, std::min<size_t>(p.exact_slots * p.dim * kElement, kCarriedBytes));
}

}  // namespace

bool prepares_ahead(const BoundedAttentionPrepare& params, DType dtype) {
  if (!params.behind_scan || !params.new_kbar || params.narrow_lam || params.narrow_theta) return false;
  if ((dtype != DType::kBFloat16 && dtype != DType::kFloat16) || params.dim % 8 != 0) return false;
  const auto p = arranged(params);
  return blocks(p) <= kMostBlocks && shared_bytes(p) <= kSharedLimit && device_capability() == 90;
}

cudaError_t prepare_ahead(const BoundedAttentionPrepare& params, DType dtype, cudaStream_t stream) {
  const auto p = arranged(params);
  const dim3 grid(static_cast<unsigned>(blocks(p)));
  return dtype == DType::kBFloat16
             ? launch_early(prepare_ahead_kernel<__nv_bfloat16>, grid, kThreads, shared_bytes(p), stream, p)
             : launch_early(prepare_ahead_kernel<__half>, grid, kThreads, shared_bytes(p), stream, p);
}

}  // namespace coda::kernels::sm90
