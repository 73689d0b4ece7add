#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include <cstdint>

namespace coda::kernels {

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulation<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(acc_t<T> x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// Arithmetic that the compiler may not contract: results that decide, or must repeat bit for bit, rest on these.
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline double div_rn(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline float sqrt_rn(float a) { return __fsqrt_rn(a); }
__device__ inline double sqrt_rn(double a) { return __dsqrt_rn(a); }

template <class A>
__device__ inline A neg_inf() {
  return -static_cast<A>(CUDART_INF_F);
}

__device__ inline void sin_cos(float x, float* s, float* c) { sincosf(x, s, c); }
__device__ inline void sin_cos(double x, double* s, double* c) { sincos(x, s, c); }

template <class A>
__device__ inline A sigmoid(A z) {
  return A(1) / (A(1) + exp(-z));
}

// log(sigmoid(z)) without overflow for either sign.
template <class A>
__device__ inline A log_sigmoid(A z) {
  return (z < A(0) ? z : A(0)) - log1p(exp(-fabs(z)));
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
__device__ inline int warp_id() { return threadIdx.x / kWarp; }
__device__ inline int warp_count() { return blockDim.x / kWarp; }

// Every lane gets the same bits: at each step both partners add the same two numbers.
template <class A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = add_rn(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// NaN ranks below every number, so that all lanes agree.
template <class A>
__device__ inline A warp_max(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, offset);
    x = x > other || other != other ? x : other;
  }
  return x;
}

template <class A>
__device__ inline A warp_min(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, offset);
    x = x < other ? x : other;
  }
  return x;
}

}  // namespace coda::kernels
