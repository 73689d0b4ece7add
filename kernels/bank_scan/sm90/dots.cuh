#pragma once

#include "../../common/fragments.cuh"
#include "../../common/similarity.cuh"

// fixed_order_dot (similarity.cuh) for 32 pairs of rows at a time, with the same bits.
namespace coda::kernels::sm90 {

constexpr int kTileRows = 8, kTileColumns = 4;  // the pairs of a tile: lane 4 i + j ends with row i, column j
constexpr int kTile = kTileRows * kTileColumns;

// A row as a warp holds it: this lane's elements are lane + 32 k.
template <int kParts, class T>
__device__ inline void load_lane_row(float (&to)[kParts], const T* row) {
#pragma unroll
  for (int k = 0; k < kParts; ++k) to[k] = widen(row[lane_id() + k * kWarp]);
}

// Rows of 16-bit elements packed for such a warp: what one lane takes lies together.
template <int kParts>
using Packed = std::conditional_t<kParts == 4, uint2, uint32_t>;
template <int kParts, class T>
__device__ inline Packed<kParts>& packed(T* row) {
  return reinterpret_cast<Packed<kParts>*>(row)[lane_id()];
}
// A lane's kParts neighbouring 16-bit elements.
template <int kParts, class T>
__device__ inline void store_part(T* to, const float (&from)[kParts]) {
  if constexpr (kParts == 4) {
    *reinterpret_cast<uint2*>(to) = {pack<T>(from[0], from[1]), pack<T>(from[2], from[3])};
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(from[0], from[1]);
  }
}
template <int kParts, class T>
__device__ inline void load_part(float (&to)[kParts], const T* from) {
  const auto words = *reinterpret_cast<const Packed<kParts>*>(from);
  float2 x;
  if constexpr (kParts == 4) {
    x = unpack<T>(words.y);
    to[2] = x.x;
    to[3] = x.y;
    x = unpack<T>(words.x);
  } else {
    x = unpack<T>(words);
  }
  to[0] = x.x;
  to[1] = x.y;
}
template <int kParts, class T>
__device__ inline void pack_lane_row(T* to, const float (&from)[kParts]) {
  store_part(to + lane_id() * kParts, from);
}
template <int kParts, class T>
__device__ inline void load_packed_row(float (&to)[kParts], const T* row) {
  load_part(to, row + lane_id() * kParts);
}

// One lane's partial sum. With kFused the products must be exact in float32, as those of two 16-bit numbers are, short of
// overflow and underflow: a fused multiply-add then rounds like the sum of a rounded product.
template <bool kFused, int kParts>
__device__ inline float lane_product(const float (&a)[kParts], const float (&b)[kParts]) {
  float partial = mul_rn(a[0], b[0]);
#pragma unroll
  for (int k = 1; k < kParts; ++k) partial = kFused ? __fmaf_rn(a[k], b[k], partial) : add_rn(partial, mul_rn(a[k], b[k]));
  return partial;
}

__device__ inline float clamped_root(float square) {
  const float norm = sqrt_rn(square);
  return norm < 1e-6f ? 1e-6f : norm;
}
template <int kParts>
__device__ inline float lane_norm(const float (&x)[kParts]) {
  return clamped_root(warp_sum(lane_product<false>(x, x)));
}
// Of the column that this lane ends a tile with.
template <int kParts>
__device__ inline float column_norm(const float (&columns)[kTileColumns][kParts]) {
  float square = 0.0f;
#pragma unroll
  for (int j = 0; j < kTileColumns; ++j) {
    const float here = warp_sum(lane_product<false>(columns[j], columns[j]));
    if (lane_id() % kTileColumns == j) square = here;
  }
  return clamped_root(square);
}

// One step of the sums of a tile's values over lanes. Each adds the pairs of lanes that warp_sum adds, but passes on only the
// half of the sums that the other lane goes on with.
template <int kWidth, bool kSwapped>
__device__ inline void fold_half(float (&x)[kTile]) {
  const bool upper = lane_id() & kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool swap = upper && !kSwapped;
    const float given = swap ? x[i] : x[i + kWidth], kept = swap ? x[i + kWidth] : x[i];
    x[i] = add_rn(kept, __shfl_xor_sync(kAllLanes, given, kWidth));
  }
}

// The dot products of a tile; load(to, i) reads this lane's part of the i-th of its 8 rows. A lane takes the rows in an order of
// its own, i ^ lane / 4, so that what it passes on always lies in the upper half.
template <bool kFused, int kParts, class Load>
__device__ inline float tile_dots(const float (&columns)[kTileColumns][kParts], Load load) {
  float x[kTile];
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    float mine[kParts];
    load(mine, i ^ lane_id() / kTileColumns);
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) x[i * kTileColumns + j] = lane_product<kFused>(mine, columns[j]);
  }
  fold_half<16, true>(x);
  fold_half<8, true>(x);
  fold_half<4, true>(x);
  fold_half<2, false>(x);
  fold_half<1, false>(x);
  return x[0];
}

}  // namespace coda::kernels::sm90
