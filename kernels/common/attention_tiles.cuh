#pragma once

// Shared-memory tiles of the portable attention kernels: rows of D accumulation-type elements, D any even number up to 256.

#include "rotation.cuh"

namespace coda::kernels {

constexpr int kMaxDim = 256;
constexpr int kVec = kMaxDim / kWarp;  // elements of a row that one lane owns: element lane + 32 i
constexpr int kTile = kWarp;           // rows of a shared tile: one per lane in dot products

template <class A>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(A);
  A x[kSize];
};

// Row stride in elements: an odd number of 16-byte packets, so that the lanes of a warp read one packet each of 32 rows without
// bank conflicts.
template <class A>
__host__ __device__ inline int row_stride(int dim) {
  constexpr int size = Packet<A>::kSize;
  return ((dim + size - 1) / size | 1) * size;
}

template <class A>
__host__ inline size_t row_bytes(int dim, int rows) {
  return sizeof(A) * static_cast<size_t>(row_stride<A>(dim)) * rows;
}

// One warp loads one row; `from` null gives zeros. The padding is zero as well: dot products run over whole packets.
template <class A, class T>
__device__ inline void load_row(A* to, const T* from, int dim) {
  const int stride = row_stride<A>(dim);
  for (int d = lane_id(); d < stride; d += kWarp) to[d] = from && d < dim ? static_cast<A>(widen(from[d])) : A(0);
}

// The block loads `count` rows, row j from from(j); no barrier.
template <class A, class From>
__device__ inline void load_tile(A* tile, int count, int dim, From from) {
  const int stride = row_stride<A>(dim);
  for (int j = warp_id(); j < count; j += warp_count()) load_row(tile + j * stride, from(j), dim);
}

// What a query goes through before it meets keys: the turn of its chunk towards the bank, then R_theta for the second stream.
template <class A>
struct QueryTurn {
  const Angle<A>* bank;  // (D/2) or null
  bool bank_interleaved;
  const A* theta;  // (D/2) of the query's head, or null
  bool theta_interleaved;
};

// Not inlined: the sine and cosine in every unrolled caller would cost more compile time than the call costs here.
template <class A>
__device__ __noinline__ void turn_query(A* row, int dim, const QueryTurn<A>& turn) {
  if (turn.bank) rotate_row(row, dim, turn.bank_interleaved, [&](int i) { return turn.bank[i]; });
  if (turn.theta) rotate_row(row, dim, turn.theta_interleaved, [&](int i) { return angle_of(turn.theta[i]); });
}

// The transpose, for gradients.
template <class A>
__device__ __noinline__ void turn_query_back(A* row, int dim, const QueryTurn<A>& turn) {
  if (turn.theta) rotate_row(row, dim, turn.theta_interleaved, [&](int i) { return angle_of(turn.theta[i], true); });
  if (turn.bank) {
    rotate_row(row, dim, turn.bank_interleaved, [&](int i) { return Angle<A>{turn.bank[i].cos, -turn.bank[i].sin}; });
  }
}

// s[l] = line l . mine, where every lane brings its own row.
template <int N, class A>
__device__ inline void dot_lines(A (&s)[N], const A* lines, const A* mine, int dim) {
  const int stride = row_stride<A>(dim);
#pragma unroll
  for (int l = 0; l < N; ++l) s[l] = A(0);
  for (int d = 0; d < dim; d += Packet<A>::kSize) {
    const Packet<A> b = *reinterpret_cast<const Packet<A>*>(mine + d);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const Packet<A> a = *reinterpret_cast<const Packet<A>*>(lines + l * stride + d);
#pragma unroll
      for (int e = 0; e < Packet<A>::kSize; ++e) s[l] += a.x[e] * b.x[e];
    }
  }
}

// out[l] += sum over j of (lane j's w[l]) * tile row j.
template <int N, class A>
__device__ inline void accumulate_lines(A (&out)[N][kVec], const A (&w)[N], const A* tile, int count, int dim) {
  const int stride = row_stride<A>(dim);
  for (int j = 0; j < count; ++j) {
    const A* row = tile + j * stride;
    A weight[N];
#pragma unroll
    for (int l = 0; l < N; ++l) weight[l] = __shfl_sync(kAllLanes, w[l], j);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i * kWarp >= dim) break;
      const int d = lane_id() + i * kWarp;
      const A x = d < dim ? row[d] : A(0);
#pragma unroll
      for (int l = 0; l < N; ++l) out[l][i] += weight[l] * x;
    }
  }
}

// f(i, d) for every element d = lane + 32 i < dim of a row that this lane owns.
template <class F>
__device__ inline void for_elements(int dim, F f) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int d = lane_id() + i * kWarp;
    if (d < dim) f(i, d);
  }
}

}  // namespace coda::kernels
