#pragma once

// What the kernels of the backward share: its workspace and a sequence as one KV head sees it.

#include <climits>

#include "../../common/ring.cuh"
#include "../../diff_attention/sm80/tiles.cuh"
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
  // Gradients of keys and values as the exact banks hold them; only rows of sources that are marked are ever written or read.
  float* bank_grad_k;        // (T, Hkv, D)
  float* bank_grad_v;        // (T, Hkv, D)
  float* state_bank_grad_k;  // (N, Hkv, W + Me, D)
  float* state_bank_grad_v;  // (N, Hkv, W + Me, D)
  uint8_t* banked;           // (T, Hkv) whether an exact bank ever holds it
  uint8_t* state_banked;     // (N, Hkv, W + Me)
};

// The steps of the backward, in this order.
cudaError_t bounded_backward_prepare(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_rows(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_bank(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_window(const BoundedBackward& params, DType dtype, cudaStream_t stream);

// Row tiles of a chunk.
__host__ __device__ inline int row_tiles(const BoundedAttentionParams& p) {
  const int size = query_block_rows(p.streams);
  const int64_t rows = (p.chunk < p.tokens ? p.chunk : p.tokens) * (p.heads / p.kv_heads);
  return static_cast<int>((rows + size - 1) / size);
}

__device__ inline int64_t sequence_of_snapshot(const BoundedBackward& p, int64_t snapshot) {
  return find_sequence(p.sequences, snapshot, [&](int64_t n) { return p.cu_seqlens[n] / p.chunk + 2 * n; });
}

// One sequence as one KV head sees it. Tokens, chunks and rows, which are (token, head of the group), count from its first new
// token on; tokens before it have negative numbers. Tokens fit 32 bits, places in tensors do not.
struct HeadView {
  const BoundedBackward& p;
  int64_t first;  // position
  int sequence, token0, row0;
  int kv_head, group, length, chunks;
  int lead;  // tokens of the first chunk that came before

  __device__ HeadView(const BoundedBackward& params, int64_t n, int head)
      : p(params), sequence(static_cast<int>(n)), kv_head(head), group(params.heads / params.kv_heads) {
    const Span span(p.cu_seqlens, p.tokens_seen, n, p.chunk);
    first = span.first;
    token0 = static_cast<int>(span.token0);
    row0 = static_cast<int>(span.row0);
    length = static_cast<int>(span.length);
    chunks = static_cast<int>(span.chunks);
    lead = static_cast<int>(first % p.chunk);
  }

  __device__ int held() const { return p.window + p.exact_slots; }
  __device__ int begin_of(int chunk) const { return max(0, chunk * p.chunk - lead); }
  __device__ int end_of(int chunk) const { return min(length, (chunk + 1) * p.chunk - lead); }
  // Of (NC, Hkv).
  __device__ int64_t snapshot(int chunk) const { return static_cast<int64_t>(row0 + chunk) * p.kv_heads + kv_head; }
  // Of (T, H).
  __device__ int64_t query_row(int row) const {
    return static_cast<int64_t>(token0 + row / group) * p.heads + kv_head * group + row % group;
  }
  // Of (Hkv, T, G).
  __device__ int64_t scalar_row(int row) const { return (kv_head * p.tokens + token0) * group + row; }
  // Of (T, Hkv) and (N, Hkv, W + Me).
  __device__ int64_t token_row(int token) const { return static_cast<int64_t>(token0 + token) * p.kv_heads + kv_head; }
  __device__ int64_t state_row(int slot) const { return static_cast<int64_t>(sequence * p.kv_heads + kv_head) * held() + slot; }

  __device__ float gate(int source) const {
    const int gate_group = p.gate_groups == 1 ? 0 : kv_head;
    return source < held() ? static_cast<const float*>(p.state_gate)[static_cast<int64_t>(sequence * p.gate_groups + gate_group) * held() + source]
                           : static_cast<const float*>(p.gate)[static_cast<int64_t>(token0 + source - held()) * p.gate_groups + gate_group];
  }
  __device__ bool biased_by_gate(int slot) const { return p.gate_bias && slot >= p.num_sinks && slot < p.exact_slots; }

  // The row of slot `slot` of a chunk's bank in one of the triples (state, new tokens, summaries); null where free.
  template <int D, class T>
  __device__ const T* bank_row(const void* state, const void* fresh, const void* summary, int chunk, int slot,
                               int source) const {
    if (source == kFree) return nullptr;
    if (source == kSummary) {
      return static_cast<const T*>(summary) + (snapshot(chunk) * p.summary_slots + slot - p.exact_slots) * D;
    }
    return source < held() ? static_cast<const T*>(state) + state_row(source) * D
                           : static_cast<const T*>(fresh) + token_row(source - held()) * D;
  }
};

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
    at = (static_cast<unsigned>(row / view.group) * view.p.heads + head) * kPackets + threadIdx.x % kPackets;
  }
  __device__ void next(const HeadView& view) {
    head += view.p.next_heads;
    at += view.p.next_packets;
    if (head >= view.group) {
      head -= view.group;
      at += view.p.next_token;
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
