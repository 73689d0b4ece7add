#pragma once

#include "numeric.cuh"

namespace coda::kernels {

// Dot product of one warp in the order that every device keeps to, since routing rests on it: element d goes to partial sum d % 32
// in increasing d, each product rounded before its sum, then partials are folded 16, 8, 4, 2, 1. keep(d) leaves elements out.
template <class A, class X, class Y, class Keep>
__device__ inline A fixed_order_dot(const X* x, const Y* y, int dim, Keep keep) {
  A partial = A(0);
  for (int d = lane_id(); d < dim; d += kWarp) {
    if (keep(d)) partial = add_rn(partial, mul_rn(static_cast<A>(widen(x[d])), static_cast<A>(widen(y[d]))));
  }
  return warp_sum(partial);
}

template <class A, class X, class Keep>
__device__ inline A clamped_norm(const X* x, int dim, Keep keep) {
  const A norm = sqrt_rn(fixed_order_dot<A>(x, x, dim, keep));
  return norm < A(1e-6) ? A(1e-6) : norm;
}

// norms[i * heads + h] = norm of row(i, h), i < count with use(i); the whole block, no barrier.
template <class A, class Use, class Row, class Keep>
__device__ inline void row_norms(A* norms, int count, int heads, int dim, Use use, Row row, Keep keep) {
  for (int item = warp_id(); item < count * heads; item += warp_count()) {
    const int i = item / heads, h = item % heads;
    if (!use(i)) continue;
    const A norm = clamped_norm<A>(row(i, h), dim, keep);
    if (lane_id() == 0) norms[item] = norm;
  }
}

// scores[i * columns + j] = mean over heads of the cosine of a(i, h) and b(j, h), where use(i, j); the whole block, no barrier.
template <class A, class Use, class RowA, class RowB, class Keep>
__device__ inline void mean_cosines(A* scores, int rows, int columns, int heads, int dim, const A* norms_a, const A* norms_b,
                                    Use use, RowA a, RowB b, Keep keep) {
  for (int item = warp_id(); item < rows * columns; item += warp_count()) {
    const int i = item / columns, j = item % columns;
    if (!use(i, j)) continue;
    A total = A(0);
    for (int h = 0; h < heads; ++h) {
      const A dot = fixed_order_dot<A>(a(i, h), b(j, h), dim, keep);
      total = add_rn(total, div_rn(dot, mul_rn(norms_a[i * heads + h], norms_b[j * heads + h])));
    }
    if (lane_id() == 0) scores[item] = div_rn(total, static_cast<A>(heads));
  }
}

// The best of a warp's (score, index) pairs: the largest score, ties to the lowest index; index -1 stands for none. NaN ranks below
// every number, so that all lanes agree.
template <class A>
struct Best {
  A score;
  int index;
};

template <class A>
__device__ inline bool better(const Best<A>& a, const Best<A>& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  const bool a_number = a.score == a.score, b_number = b.score == b.score;
  if (a_number != b_number) return a_number;
  return a.score > b.score || (!(a.score < b.score) && a.index < b.index);
}

template <class A>
__device__ inline Best<A> warp_best(Best<A> mine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Best<A> other{__shfl_xor_sync(kAllLanes, mine.score, offset), __shfl_xor_sync(kAllLanes, mine.index, offset)};
    if (better(other, mine)) mine = other;
  }
  return mine;
}

// One warp writes the indices i < count with keep(i) to list, in ascending order, and returns their number.
template <class Keep>
__device__ inline int compact(int* list, int count, Keep keep) {
  int total = 0;
#pragma unroll 1
  for (int base = 0; base < count; base += kWarp) {
    const int i = base + lane_id();
    const bool kept = i < count && keep(i);
    const unsigned mask = __ballot_sync(kAllLanes, kept);
    if (kept) list[total + __popc(mask & ((1u << lane_id()) - 1))] = i;
    total += __popc(mask);
  }
  __syncwarp();
  return total;
}

}  // namespace coda::kernels
