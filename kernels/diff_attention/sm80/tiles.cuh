#pragma once

// Tiles in shared memory, the products of a warp with them, and the sequence that a block meets.

#include "../../common/launch.cuh"
#include "../../common/mma.cuh"
#include "../../common/rotation.cuh"
#include "../../common/sequences.cuh"
#include "../params.h"

namespace coda::kernels::sm80 {

using namespace ampere;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;  // rows of a block, 16 a warp
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A tile has rows of D elements in packets of 16 bytes. Packet p of row r stands at p ^ r % 8, so that the eight rows of an 8x8
// matrix lie in different banks. Bases of tiles, and of their parts, are at multiples of eight rows.
template <int D>
__device__ inline int place(int row, int packet) {
  return row * D + ((packet ^ (row & 7)) << 3);
}

// The block brings Rows rows, `stride` elements apart; zeros from row `count` on.
template <int D, int Rows, class T>
__device__ inline void load_tile(T* tile, const T* from, int64_t stride, int count) {
  constexpr int kPackets = D / 8, kStep = kThreads / kPackets;
  const int packet = threadIdx.x % kPackets;
#pragma unroll
  for (int i = 0; i < Rows / kStep; ++i) {
    const int row = i * kStep + threadIdx.x / kPackets;
    copy_packet(tile + place<D>(row, packet), from + row * stride + packet * 8, row < count);
  }
}

// `threads` threads write the first `count` of Rows rows of a tile.
template <int D, int Rows, class T>
__device__ inline void write_tile(T* to, int64_t stride, int count, const T* tile, int thread, int threads) {
  constexpr int kPackets = D / 8;
  for (int i = thread; i < Rows * kPackets; i += threads) {
    const int row = i / kPackets, packet = i % kPackets;
    if (row < count) {
      *reinterpret_cast<uint4*>(to + row * stride + packet * 8) = *reinterpret_cast<const uint4*>(tile + place<D>(row, packet));
    }
  }
}

// A warp writes the first `count` of 16 rows of accumulators, through 16 rows of shared memory that are its own.
template <int D, class T>
__device__ inline void write_rows(T* to, int64_t stride, int count, const float (&x)[D / 8][4], T* through) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    *reinterpret_cast<uint32_t*>(through + place<D>(row, n) + column) = pack<T>(x[n][0], x[n][1]);
    *reinterpret_cast<uint32_t*>(through + place<D>(row + 8, n) + column) = pack<T>(x[n][2], x[n][3]);
  }
  __syncwarp();
  write_tile<D, 16>(to, stride, count, through, lane_id(), kWarp);
}

// d[m] += a_m b^T: 16 rows a_m, `distance` elements from one m to the next, with 8 N rows b.
template <int D, int M, int N, class T>
__device__ inline void multiply_rows(float (&d)[M][N][4], const T* a, int distance, const T* b) {
  const int lane = lane_id();
// Not all of it at once: with more fragments on their way the largest kernels run out of registers.
#pragma unroll 4
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(left[m], a + m * distance + place<D>(lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, b + place<D>(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(d[m][n], left[m], right[0], right[1]);
        multiply<T>(d[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// d[m] += w[m] b: 16 rows of weights, accumulators of an earlier product that are rounded here, with as many rows b as they
// have columns.
template <int D, int M, int N, class T>
__device__ inline void multiply_columns(float (&d)[M][D / 8][4], const float (&w)[M][N][4], const T* b) {
  const int lane = lane_id();
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
      load_matrices_transposed(right, b + place<D>(16 * k + lane % 16, n + lane / 16));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(d[m][n], left[m], right[0], right[1]);
        multiply<T>(d[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// second = R_theta first, kRows rows. A thread keeps to one plane, so that the block takes each sine a few times only.
template <int D, class T>
__device__ inline void turn_tile(T* second, const T* first, const float* theta, bool interleaved) {
  const int plane = threadIdx.x % (D / 2);
  const auto angle = angle_of(theta[plane]);
  const int a = first_of_pair(plane, interleaved), b = second_of_pair(plane, D, interleaved);
#pragma unroll 4
  for (int row = threadIdx.x / (D / 2); row < kRows; row += kThreads / (D / 2)) {
    const int at_a = place<D>(row, a / 8) + a % 8, at_b = place<D>(row, b / 8) + b % 8;
    float x = widen(first[at_a]), y = widen(first[at_b]);
    turn_pair(x, y, angle);
    second[at_a] = narrow<T>(x);
    second[at_b] = narrow<T>(y);
  }
}

// Sums and maxima over the four lanes that hold a row of accumulators.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ inline int64_t query_offset(const DiffAttentionParams& p, int64_t n) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[n] : n * p.length_q;
}
__device__ inline int64_t key_offset(const DiffAttentionParams& p, int64_t n) {
  return p.cu_seqlens_k ? p.cu_seqlens_k[n] : n * p.length_k;
}

__device__ inline Tile find_query_tile(const DiffAttentionParams& p, int64_t index, int size) {
  return find_tile(p.sequences, index, size, [&](int64_t n) { return query_offset(p, n); });
}
__device__ inline Tile find_key_tile(const DiffAttentionParams& p, int64_t index, int size) {
  return find_tile(p.sequences, index, size, [&](int64_t n) { return key_offset(p, n); });
}

struct Sequence {
  int64_t index;
  int64_t query0, key0;  // first token of each, over all sequences
  int queries, keys;
  bool causal;

  __device__ Sequence(const DiffAttentionParams& p, int64_t n)
      : index(n), query0(query_offset(p, n)), key0(key_offset(p, n)),
        queries(static_cast<int>(query_offset(p, n + 1) - query0)), keys(static_cast<int>(key_offset(p, n + 1) - key0)),
        causal(p.causal) {}

  // Keys that a query sees: the leading ones, none where this is negative.
  __device__ int visible(int query) const { return causal ? query + keys - queries + 1 : keys; }

  template <class T>
  __device__ const T* q(const DiffAttentionParams& p, int head) const {
    return first_row<T>(p.q, p.q_strides, p.cu_seqlens_q ? query0 : 0, head);
  }
  template <class T>
  __device__ const T* k(const DiffAttentionParams& p, int head) const {
    return first_row<T>(p.k, p.k_strides, p.cu_seqlens_k ? key0 : 0, head);
  }
  template <class T>
  __device__ const T* v(const DiffAttentionParams& p, int head) const {
    return first_row<T>(p.v, p.v_strides, p.cu_seqlens_k ? key0 : 0, head);
  }

 private:
  template <class T>
  __device__ const T* first_row(const void* x, const Strides& s, int64_t token, int head) const {
    return static_cast<const T*>(x) + index * s.sequence + token * s.token + head * s.head;
  }
};

// The rows of a query-stationary block: tokens of one query head. A causal row sees the more keys the later it is, so the last
// tiles come first, and the blocks that run last are short.
struct QueryBlock {
  int head, kv_head, tile;
  Tile where;
  Sequence sequence;
  int row0, rows;  // none where `rows` is not positive
  int seen;        // keys that any of them sees

  __device__ QueryBlock(const DiffAttentionParams& p, int size)
      : head(blockIdx.x % p.heads), kv_head(head / (p.heads / p.kv_heads)),
        tile(gridDim.x / p.heads - 1 - blockIdx.x / p.heads), where(find_query_tile(p, tile, size)),
        sequence(p, where.sequence), row0(static_cast<int>(where.begin)), rows(min(size, sequence.queries - row0)),
        seen(max(0, sequence.visible(row0 + rows - 1))) {}

  // token * H + head: the index of a row in (Tq, H).
  __device__ int64_t at(const DiffAttentionParams& p, int row) const { return (sequence.query0 + row0 + row) * p.heads + head; }
};

// A warp of one has 16 rows twice: the same tokens in q and in R_theta q or, with one stream, other tokens kRows further.
// Either way each fragment of keys and values that it loads serves two products, and what the streams have of a row is in the
// same registers of the same lane.
__host__ __device__ constexpr int query_block_rows(int streams) { return kRows * (3 - streams); }

// The warp's rows that a lane has accumulators of, [m][n][e]: row(m, e / 2).
struct LaneRows {
  int first;    // of the warp
  int further;  // from m = 0 to m = 1
  int visible;  // keys that row(0, 0) sees; every row of a causal block sees one key more than the row before
  int fewest;   // keys that the first row of the warp sees
  int causal;

  __device__ LaneRows(const QueryBlock& block, int streams)
      : first(16 * warp_id()), further(streams == 1 ? kRows : 0), visible(block.sequence.visible(block.row0 + row(0, 0))),
        fewest(block.sequence.visible(block.row0 + first)), causal(block.sequence.causal) {}

  __device__ int row(int m, int r) const { return first + lane_id() / 4 + 8 * r + m * further; }

  // Replaces what belongs to keys that its row does not see; `key` is that of the first column.
  template <int N>
  __device__ void hide(float (&s)[2][N][4], int key, float value) const {
    if (key + 8 * N <= fewest) return;
    const int column = key + lane_id() % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) {
        const int more = causal * (i % 4 / 2 * 8 + m * further);
        if (column + i / 4 * 8 + i % 2 >= visible + more) s[m][i / 4][i % 4] = value;
      }
    }
  }
};

// Blocks of one query head.
inline int64_t query_blocks(const DiffAttentionParams& p) {
  return p.queries ? tile_bound(p.queries, p.sequences, query_block_rows(p.streams)) : 0;
}

// Calls f with a value of the storage type and D.
template <class F>
cudaError_t dispatch(DType dtype, int dim, F f) {
  const auto with_dim = [&](auto zero) {
    if (dim == 64) return f(zero, std::integral_constant<int, 64>());
    if (dim == 128) return f(zero, std::integral_constant<int, 128>());
    return cudaErrorInvalidValue;
  };
  if (dtype == DType::kBFloat16) return with_dim(__nv_bfloat16{});
  if (dtype == DType::kFloat16) return with_dim(__half{});
  return cudaErrorInvalidValue;
}

}  // namespace coda::kernels::sm80
