#include "vector_math.h"

#include <algorithm>
#include <cstring>

namespace coda::cpu {
namespace {

// e^x for x <= 0, relative error under 2e-7: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r, then 2^n by
// exponent bits. Below the least normal float the result is 0.
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

inline double exp_nonpositive(double x) { return std::exp(x); }

template <class T>
inline T max_body(T* __restrict x, const T* __restrict bias, int64_t n, T peak) {
  T lane[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lane[l] = peak;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const T value = bias ? x[i + l] + bias[i + l] : x[i + l];
      x[i + l] = value;
      lane[l] = lane[l] > value ? lane[l] : value;
    }
  }
  for (; i < n; ++i) {
    if (bias) x[i] += bias[i];
    peak = std::max(peak, x[i]);
  }
  for (int64_t l = 0; l < kLanes; ++l) peak = std::max(peak, lane[l]);
  return peak;
}

template <class T>
inline T exp_body(T* __restrict x, int64_t n, T peak) {
  T lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      x[i + l] = exp_nonpositive(x[i + l] - peak);
      lane[l] += x[i + l];
    }
  }
  T total = 0;
  for (; i < n; ++i) total += x[i] = exp_nonpositive(x[i] - peak);
  for (int64_t l = 0; l < kLanes; ++l) total += lane[l];
  return total;
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
double exp_and_sum(double* x, int64_t n, double peak) { return exp_body(x, n, peak); }

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
