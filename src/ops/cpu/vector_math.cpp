#include "vector_math.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

// Into every clone that calls it, to be compiled for its instruction set.
#define CODA_ALWAYS __attribute__((always_inline))
#define CODA_INLINE inline CODA_ALWAYS

namespace coda::cpu {
namespace {

// Eight floats or four doubles, spelled out: compilers do not vectorise a loop with a comparison in it, and keep an array of lanes
// in memory.
template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(32)));
};
template <class T>
using vector_t = typename Vector<T>::type;
template <class T>
constexpr int64_t vector_lanes = sizeof(vector_t<T>) / sizeof(T);

template <class T>
CODA_INLINE T sum_of(const vector_t<T>& x) {
  typedef T Half __attribute__((vector_size(16)));
  Half low, high;
  std::memcpy(&low, &x, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  low += high;
  if constexpr (sizeof(T) == sizeof(double)) {
    return low[0] + low[1];
  } else {
    return (low[0] + low[2]) + (low[1] + low[3]);
  }
}

// f(i, count) for every vector of n elements; the last may hold fewer. A full one knows its count as a constant.
template <class T, class F>
CODA_INLINE void each_vector(int64_t n, const F& f) {
  constexpr int64_t lanes = vector_lanes<T>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, std::integral_constant<int64_t, lanes>());
  if (i < n) f(i, n - i);
}

// e^x for x <= 0, relative error under 2e-7: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r, then 2^n by
// exponent bits. Below the least normal float the result is 0.
CODA_INLINE void exp_nonpositive(vector_t<float>& x) {
  typedef int32_t Bits __attribute__((vector_size(32)));
  constexpr float least = -87.0f;
  const vector_t<float> zero = {}, clamped = x < least ? zero + least : x;
  const vector_t<float> n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const vector_t<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  vector_t<float> p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits bits = (__builtin_convertvector(n, Bits) + 127) << 23;
  vector_t<float> power;
  std::memcpy(&power, &bits, sizeof power);
  x = x < least ? zero : p * power;
}

CODA_INLINE void exp_nonpositive(vector_t<double>& x) {
  for (int64_t l = 0; l < vector_lanes<double>; ++l) x[l] = std::exp(x[l]);
}

template <class T>
CODA_INLINE T max_body(T* x, const T* bias, int64_t n, T peak) {
  vector_t<T> most = vector_t<T>{} + peak;
  each_vector<T>(n, [&](int64_t i, auto count) CODA_ALWAYS {
    vector_t<T> value = vector_t<T>{} - std::numeric_limits<T>::infinity(), added = {};
    std::memcpy(&value, x + i, count * sizeof(T));
    if (bias) std::memcpy(&added, bias + i, count * sizeof(T));
    value += added;
    std::memcpy(x + i, &value, count * sizeof(T));
    most = most > value ? most : value;
  });
  for (int64_t l = 0; l < vector_lanes<T>; ++l) peak = std::max(peak, most[l]);
  return peak;
}

template <class T>
CODA_INLINE T exp_body(T* x, int64_t n, T peak) {
  vector_t<T> total = {};
  each_vector<T>(n, [&](int64_t i, auto count) CODA_ALWAYS {
    vector_t<T> value = vector_t<T>{} - std::numeric_limits<T>::infinity();
    std::memcpy(&value, x + i, count * sizeof(T));
    value -= peak;
    exp_nonpositive(value);
    std::memcpy(x + i, &value, count * sizeof(T));
    total += value;
  });
  return sum_of<T>(total);
}

template <class T>
inline T dot_body(const T* __restrict a, const T* __restrict b, int64_t n) {
  T lane[32] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int64_t l = 0; l < 32; ++l) lane[l] += a[i + l] * b[i + l];
  }
  for (int64_t l = 0; i < n; ++i, ++l) lane[l] += a[i] * b[i];
  for (int64_t width = 16; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

template <class T>
inline void dot_lines_body(T* __restrict out, int64_t stride, const T* __restrict lines, int64_t count, const T* __restrict x,
                           int64_t n) {
  constexpr int64_t lanes = 8;  // more would have to be folded again
  for (int64_t l = 0; l < count; ++l, lines += n) {
    T lane[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      for (int64_t j = 0; j < lanes; ++j) lane[j] += lines[i + j] * x[i + j];
    }
    T total = 0;
    for (; i < n; ++i) total += lines[i] * x[i];
    out[l * stride] = total + (((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7])));
  }
}

template <class T>
inline void add_to_lines_body(T* __restrict lines, int64_t count, const T* __restrict weight, int64_t stride, const T* __restrict x,
                              int64_t n) {
  for (int64_t l = 0; l < count; ++l, lines += n) {
    for (int64_t i = 0; i < n; ++i) lines[i] += weight[l * stride] * x[i];
  }
}

}  // namespace

CODA_TARGET_CLONES float add_bias_and_max(float* x, const float* bias, int64_t n, float peak) {
  return max_body(x, bias, n, peak);
}
CODA_TARGET_CLONES double add_bias_and_max(double* x, const double* bias, int64_t n, double peak) {
  return max_body(x, bias, n, peak);
}
CODA_TARGET_CLONES float exp_and_sum(float* x, int64_t n, float peak) { return exp_body(x, n, peak); }
CODA_TARGET_CLONES double exp_and_sum(double* x, int64_t n, double peak) { return exp_body(x, n, peak); }

CODA_TARGET_CLONES void scale_row(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
CODA_TARGET_CLONES void scale_row(double* x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

CODA_TARGET_CLONES void softmax_backward_row(float* __restrict p, const float* __restrict dp, int64_t n, float factor, float d) {
  for (int64_t i = 0; i < n; ++i) p[i] = factor * p[i] * (dp[i] - d);
}
CODA_TARGET_CLONES void softmax_backward_row(double* __restrict p, const double* __restrict dp, int64_t n, double factor,
                                             double d) {
  for (int64_t i = 0; i < n; ++i) p[i] = factor * p[i] * (dp[i] - d);
}

CODA_TARGET_CLONES void axpy_row(float* __restrict y, const float* __restrict x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}
CODA_TARGET_CLONES void axpy_row(double* __restrict y, const double* __restrict x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

CODA_TARGET_CLONES void dot_lines(float* out, int64_t stride, const float* lines, int64_t count, const float* x, int64_t n) {
  dot_lines_body(out, stride, lines, count, x, n);
}
CODA_TARGET_CLONES void dot_lines(double* out, int64_t stride, const double* lines, int64_t count, const double* x, int64_t n) {
  dot_lines_body(out, stride, lines, count, x, n);
}
CODA_TARGET_CLONES void add_to_lines(float* lines, int64_t count, const float* weight, int64_t stride, const float* x, int64_t n) {
  add_to_lines_body(lines, count, weight, stride, x, n);
}
CODA_TARGET_CLONES void add_to_lines(double* lines, int64_t count, const double* weight, int64_t stride, const double* x,
                                     int64_t n) {
  add_to_lines_body(lines, count, weight, stride, x, n);
}

CODA_TARGET_CLONES float fixed_order_dot(const float* a, const float* b, int64_t n) { return dot_body(a, b, n); }
CODA_TARGET_CLONES double fixed_order_dot(const double* a, const double* b, int64_t n) { return dot_body(a, b, n); }

}  // namespace coda::cpu
