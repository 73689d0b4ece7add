#pragma once

// What the kernels of the backward share: its workspace and a sequence as one KV head sees it.

#include <climits>
#include <new>

#include "../../common/ring.cuh"
#include "../../diff_attention/sm80/tiles.cuh"
#include "../chunk_rows.cuh"
#include "../launch.h"

namespace coda::kernels::sm80 {

constexpr int kSlotTile = 16 * kWarps;  // slots of a block that gathers their gradients, 16 a warp
constexpr int kFree = -1, kSummary = INT_MAX;

// What one bank slot is to the queries of a chunk.
struct alignas(8) BankSlot {
  int source;  // flat source, kSummary for a summary slot, kFree
  float bias;  // slot bias over the scale: what a dot product of query and key starts from; -inf where free
};

// What the gradients of a row's logits need, by stream.
struct alignas(16) RowScalars {
  float shift[2];  // log sum exp in units of log 2
  float delta[2];
};

struct BoundedBackward : BoundedAttentionBackward {
  int slots;                   // of a snapshot in `bank`: Me + Ms, rounded up to whole tiles
  int segment;                 // chunks that one block walks to gather the gradients of slots
  int next_heads, next_packets, next_token;  // see RowWalk
  void* q2;                    // (T, H, D) R_theta q; null with one stream
  void* bank_q;                // (T, H, D) queries as the bank's keys meet them; q itself without bank_distance
  void* bank_q2;               // (T, H, D) R_theta of that; null with one stream
  void* rounded_k;             // (NC, Hkv, Ms, D) summary slots in the storage type
  void* rounded_v;             // (NC, Hkv, Ms, D)
  BankSlot* bank;              // (NC, Hkv, slots)
  int32_t* used;               // (NC, Hkv) slots up to the last that is not free
  RowScalars* scalars;         // (Hkv, T, G)
  float* row_lam;              // (Hkv, T, G) lam; null with one stream
  Angle<float>* theta_angles;  // (H, D/2)
  Angle<float>* bank_angles;   // (NC, D/2) by which each chunk's queries were turned
  // Gradients of keys, values and biases of what the exact banks hold, in two parts. Those of the segment of chunks in which a
  // source enters, at the source; only sources that ever stand in a bank have them.
  float* bank_grad_k;           // (T, Hkv, D)
  float* bank_grad_v;           // (T, Hkv, D)
  float* bank_grad_bias;        // (T, Hkv)
  float* state_bank_grad_k;     // (N, Hkv, W + Me, D)
  float* state_bank_grad_v;     // (N, Hkv, W + Me, D)
  float* state_bank_grad_bias;  // (N, Hkv, W + Me)
  // And those of later segments, at the segment and the slot; see segment_row.
  float* segment_grad_k;     // (NC / segment, Hkv, slots, D)
  float* segment_grad_v;     // (NC / segment, Hkv, slots, D)
  float* segment_grad_bias;  // (NC / segment, Hkv, slots)
  int32_t* entry;            // (T, Hkv) 1 + slots * (segment of entry) + slot; 0 for what no bank ever holds
  int32_t* state_entry;      // (N, Hkv, W + Me)
};

// The steps of the backward, in this order.
cudaError_t bounded_backward_prepare(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_rows(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_bank(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_collect(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_window(const BoundedBackward& params, DType dtype, cudaStream_t stream);

// Row tiles of a chunk.
__host__ __device__ inline int row_tiles(const BoundedAttentionParams& p) {
  return static_cast<int>(tiles_per_chunk(p, query_block_rows(p.streams)));
}

// One sequence as one KV head sees it. Tokens, chunks and rows, which are (token, head of the group), count from its first new
// token on; tokens before it have negative numbers. Tokens fit 32 bits, places in tensors do not.
struct HeadView {
  int64_t first;  // position of the first new token
  int sequence, token0, row0, length, chunks;
  int lead;  // tokens of the first chunk that came before
  int kv_head, group;
  int heads, kv_heads, tokens, chunk_tokens, held, slots;  // of all sequences: H, Hkv, T, C, W + Me and the slots of `bank`

  __device__ HeadView(const BoundedBackward& p, int64_t n, int head)
      : sequence(static_cast<int>(n)), kv_head(head), group(p.heads / p.kv_heads), heads(p.heads), kv_heads(p.kv_heads),
        tokens(static_cast<int>(p.tokens)), chunk_tokens(p.chunk), held(p.window + p.exact_slots), slots(p.slots) {
    const Span span(p.cu_seqlens, p.tokens_seen, n, p.chunk);
    first = span.first;
    token0 = static_cast<int>(span.token0);
    row0 = static_cast<int>(span.row0);
    length = static_cast<int>(span.length);
    chunks = static_cast<int>(span.chunks);
    lead = static_cast<int>(first % p.chunk);
  }

  __device__ int begin_of(int chunk) const { return max(0, chunk * chunk_tokens - lead); }
  __device__ int end_of(int chunk) const { return min(length, (chunk + 1) * chunk_tokens - lead); }
  // Of (NC, Hkv).
  __device__ int64_t snapshot(int chunk) const { return static_cast<int64_t>(row0 + chunk) * kv_heads + kv_head; }
  // Of (T, H).
  __device__ int64_t query_row(int row) const {
    return static_cast<int64_t>(token0 + row / group) * heads + kv_head * group + row % group;
  }
  // Of (Hkv, T, G).
  __device__ int64_t scalar_row(int row) const {
    return (static_cast<int64_t>(kv_head) * tokens + token0) * group + row;
  }
  // Of (T, Hkv) and (N, Hkv, W + Me).
  __device__ int64_t token_row(int token) const { return static_cast<int64_t>(token0 + token) * kv_heads + kv_head; }
  __device__ int64_t state_row(int slot) const { return static_cast<int64_t>(sequence * kv_heads + kv_head) * held + slot; }
  // Of (NC / segment, Hkv, slots), for segments of `size` chunks but the first. A sequence's last one stands before the next
  // sequence's second: it has chunks / size more at most, and so many more rows between the first chunk rows of both.
  __device__ int64_t segment_row(int size, int segment, int slot) const {
    return (static_cast<int64_t>(row0 / size + segment - 1) * kv_heads + kv_head) * slots + slot;
  }

  __device__ float gate(const BoundedBackward& p, int source) const {
    const int gate_group = p.gate_groups == 1 ? 0 : kv_head;
    const int64_t at = source < held ? static_cast<int64_t>(sequence * p.gate_groups + gate_group) * held + source
                                     : static_cast<int64_t>(token0 + source - held) * p.gate_groups + gate_group;
    return static_cast<const float*>(source < held ? p.state_gate : p.gate)[at];
  }

  // The row of slot `slot` of a chunk's bank in one of the triples (state, new tokens, summaries); null where free.
  template <int D, class T>
  __device__ const T* bank_row(const BoundedBackward& p, const void* state, const void* fresh, const void* summary, int chunk,
                               int slot, int source) const {
    if (source == kFree) return nullptr;
    if (source == kSummary) {
      return static_cast<const T*>(summary) + (snapshot(chunk) * p.summary_slots + slot - p.exact_slots) * D;
    }
    return source < held ? static_cast<const T*>(state) + state_row(source) * D
                         : static_cast<const T*>(fresh) + token_row(source - held) * D;
  }
};

// The view of a whole block, in shared memory: registers are short. Ends with a barrier.
__device__ inline const HeadView& block_view(const BoundedBackward& p, int64_t n, int head) {
  __shared__ __align__(8) unsigned char kept[sizeof(HeadView)];
  if (threadIdx.x == 0) new (kept) HeadView(p, n, head);
  __syncthreads();
  return *reinterpret_cast<const HeadView*>(kept);
}

__device__ inline bool biased_by_gate(const BoundedBackward& p, int slot) {
  return p.gate_bias && slot >= p.num_sinks && slot < p.exact_slots;
}

// Calls visit(row, packet) for the packets of Rows rows that this thread brings.
template <int D, int Rows, class Visit>
__device__ inline void for_packets(Visit visit) {
  constexpr int kPackets = D / 8, kRowsAtOnce = kThreads / kPackets;
#pragma unroll 1
  for (int i = 0; i < Rows / kRowsAtOnce; ++i) visit(i * kRowsAtOnce + threadIdx.x / kPackets, threadIdx.x % kPackets);
}

// The query rows that a thread brings, kRowsAtOnce from one to the next: where they stand, without a division for each.
template <int D>
struct RowWalk {
  static constexpr int kPackets = D / 8, kRowsAtOnce = kThreads / kPackets;
  int head;     // within the group
  unsigned at;  // packets from the sequence's first row

  // What `next` adds, from the host.
  static void measure(BoundedBackward& p) {
    const int group = p.heads / p.kv_heads;
    p.next_heads = kRowsAtOnce % group;
    p.next_packets = (kRowsAtOnce / group * p.heads + p.next_heads) * kPackets;
    p.next_token = (p.heads - group) * kPackets;
  }

  __device__ void seek(const HeadView& view, int row) {
    row += threadIdx.x / kPackets;
    head = row % view.group;
    at = (static_cast<unsigned>(row / view.group) * view.heads + head) * kPackets + threadIdx.x % kPackets;
  }
  __device__ void next(const BoundedBackward& p, int group) {
    head += p.next_heads;
    at += p.next_packets;
    if (head >= group) {
      head -= group;
      at += p.next_token;
    }
  }
};

// d[m] += a_m b^T and d[m] += w[m] b as in tiles.cuh, for tiles at multiples of their rows' size: then packets differ from one
// another by one exclusive or of the address.
template <int D, int M, int N, class T>
__device__ inline void multiply_rows_at(float (&d)[M][N][4], const T* a, int distance, const T* b) {
  const int lane = lane_id();
  const uint32_t left_at = shared_address(a + place<D>(lane % 16, lane / 16));
  const uint32_t right_at = shared_address(b + place<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices_at(left[m], (left_at ^ (k << 5)) + m * distance * sizeof(T));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices_at(right, (right_at ^ (k << 5)) + 8 * n * D * sizeof(T));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(d[m][n], left[m], right[0], right[1]);
        multiply<T>(d[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}
template <int D, int M, int N, class T>
__device__ inline void multiply_columns_at(float (&d)[M][D / 8][4], const float (&w)[M][N][4], const T* b) {
  const uint32_t right_at = shared_address(b + place<D>(lane_id() % 16, lane_id() / 16));
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[m][i] = pack<T>(w[m][2 * k + i / 2][i % 2 * 2], w[m][2 * k + i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t right[4];
      load_matrices_transposed_at(right, (right_at ^ (n << 4)) + 16 * k * D * sizeof(T));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(d[m][n], left[m], right[0], right[1]);
        multiply<T>(d[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// A warp writes 16 rows of accumulators through 16 rows of shared memory that are its own; to(row) is null for none.
template <int D, class T, class To>
__device__ inline void scatter_rows(const float (&x)[D / 8][4], T* through, To to) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    *reinterpret_cast<uint32_t*>(through + place<D>(row, n) + column) = pack<T>(x[n][0], x[n][1]);
    *reinterpret_cast<uint32_t*>(through + place<D>(row + 8, n) + column) = pack<T>(x[n][2], x[n][3]);
  }
  __syncwarp();
  constexpr int kPackets = D / 8;
#pragma unroll 1
  for (int i = lane_id(); i < 16 * kPackets; i += kWarp) {
    T* at = to(i / kPackets);
    const int packet = i % kPackets;
    if (at) {
      *reinterpret_cast<uint4*>(at + packet * 8) = *reinterpret_cast<const uint4*>(through + place<D>(i / kPackets, packet));
    }
  }
}

}  // namespace coda::kernels::sm80
