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

// The same for several angles beside each other: sincos branches, and waits for itself most of the time. Cosine and sine of a
// phase below 2^50 to 2^-52 before they are rounded: rounded as those of sincos, on the CPU without an exception in 80 million.
template <class A>
__device__ inline Angle<A> angle_beside(int64_t position, double frequency) {
  if constexpr (sizeof(A) > sizeof(float)) {
    return rope_angle<A>(position, frequency);
  } else {
    const double phase = mul_rn(static_cast<double>(position), frequency);
    constexpr double kInteger = 0x1.8p52;  // added to a number below 2^51, it leaves an integer in the last bits
    const double turns = fma(phase, 0x1.45f306dc9c883p-1, kInteger), quarters = turns - kInteger;
    const double x = fma(-quarters, 0x1.1a62633145c07p-54, fma(-quarters, 0x1.921fb54442d18p+0, phase)), y = x * x;
    double s = fma(y, 1.58947437659101226e-10, -2.50507351275220861e-08);
    double c = fma(y, 2.06304662407954607e-09, -2.75552611044796500e-07);
    s = fma(y, s, 2.75573136552475882e-06);
    c = fma(y, c, 2.48015789564886518e-05);
    s = fma(y, s, -1.98412698301534622e-04);
    c = fma(y, c, -1.38888888722312203e-03);
    s = fma(y, s, 8.33333333332367254e-03);
    c = fma(y, c, 4.16666666665218982e-02);
    s = fma(y, s, -1.66666666666666435e-01);
    c = fma(y, c, -4.99999999999996336e-01);
    const auto sine = static_cast<float>(fma(x * y, s, x)), cosine = static_cast<float>(fma(y, c, 1.0));
    const int quarter = __double2loint(turns);
    const float a = quarter & 1 ? sine : cosine, b = quarter & 1 ? cosine : sine;
    return {(quarter + 1) & 2 ? -a : a, quarter & 2 ? -b : b};
  }
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
