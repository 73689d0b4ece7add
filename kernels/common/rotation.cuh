#pragma once

#include "numeric.cuh"

namespace coda::kernels {

// The two dimensions that plane rotation i turns: (i, i + D/2), or (2i, 2i + 1).
__device__ inline int first_of_pair(int i, bool interleaved) { return interleaved ? 2 * i : i; }
__device__ inline int second_of_pair(int i, int dim, bool interleaved) { return interleaved ? 2 * i + 1 : i + dim / 2; }

template <class A>
struct Angle {
  A cos, sin;
};

// The angle position * frequency: phase in float64, cosine and sine rounded once.
template <class A>
__device__ inline Angle<A> rope_angle(int64_t position, double frequency) {
  double s, c;
  sincos(mul_rn(static_cast<double>(position), frequency), &s, &c);
  return {static_cast<A>(c), static_cast<A>(s)};
}

template <class A>
__device__ inline Angle<A> angle_of(A theta, bool inverse = false) {
  Angle<A> turn;
  sin_cos(theta, &turn.sin, &turn.cos);
  if (inverse) turn.sin = -turn.sin;
  return turn;
}

// (a, b) turned. Never contracted, so that a turned key has the same bits wherever it is computed.
template <class A>
__device__ inline void turn_pair(A& a, A& b, Angle<A> by) {
  const A turned = add_rn(mul_rn(a, by.cos), -mul_rn(b, by.sin));
  b = add_rn(mul_rn(a, by.sin), mul_rn(b, by.cos));
  a = turned;
}

// One warp turns a row of D elements in place; angle(i) is that of pair i. Ends with the row visible to the warp.
template <class A, class AngleOf>
__device__ inline void rotate_row(A* row, int dim, bool interleaved, AngleOf angle) {
  __syncwarp();
  for (int i = lane_id(); i < dim / 2; i += kWarp) {
    turn_pair(row[first_of_pair(i, interleaved)], row[second_of_pair(i, dim, interleaved)], angle(i));
  }
  __syncwarp();
}

// What a bank slot holds of the key at `position` (semantics 3.7): turned back to position 0, rounded once. One warp.
template <class T>
__device__ inline void turn_back_row(T* to, const T* from, int dim, int64_t position, const double* inv_freq,
                                     bool interleaved) {
  for (int i = lane_id(); i < dim / 2; i += kWarp) {
    const int first = first_of_pair(i, interleaved), second = second_of_pair(i, dim, interleaved);
    acc_t<T> a = widen(from[first]), b = widen(from[second]);
    turn_pair(a, b, rope_angle<acc_t<T>>(-position, inv_freq[i]));
    to[first] = narrow<T>(a);
    to[second] = narrow<T>(b);
  }
}

}  // namespace coda::kernels
