#include "vector_math.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

// Into every clone that calls it, to be compiled for its instruction set.
#define CODA_ALWAYS __attribute__((always_inline))
#define CODA_INLINE inline CODA_ALWAYS

namespace coda::cpu {
namespace {

// Eight floats or four doubles. Vectors that work side by side have to be spelled out, without a loop over them: as an array of
// lanes, or of vectors with a running index, compilers keep them in memory, and a comparison keeps them from vectorising at all.
template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(32)));
};
template <class T>
using vector_t = typename Vector<T>::type;
template <class T>
constexpr int64_t vector_lanes = sizeof(vector_t<T>) / sizeof(T);

template <class T>
CODA_INLINE void load(vector_t<T>& to, const T* from) {
  std::memcpy(&to, from, sizeof to);
}

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

// f(0), f(1), ..., f(N - 1), each with its number as a constant.
template <int N, class F>
CODA_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) CODA_ALWAYS { (f(std::integral_constant<int, I>()), ...); }
  (std::make_integer_sequence<int, N>());
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

// --- a few lines against many rows -----------------------------------------------------------------------------------------

// L lines against R rows.
template <int L, int R, class T>
CODA_INLINE void dot_block(T* out, int64_t stride, const T* lines, const T* const* rows, int64_t n) {
  vector_t<T> sum[L * R] = {}, row[R], line[L];
  int64_t i = 0;
  for (; i + vector_lanes<T> <= n; i += vector_lanes<T>) {
    unrolled<R>([&](auto r) CODA_ALWAYS { load(row[r], rows[r] + i); });
    unrolled<L>([&](auto l) CODA_ALWAYS { load(line[l], lines + l * n + i); });
    unrolled<L * R>([&](auto lr) CODA_ALWAYS { sum[lr] += line[lr / R] * row[lr % R]; });
  }
  unrolled<L * R>([&](auto lr) CODA_ALWAYS { out[lr / R * stride + lr % R] = sum_of<T>(sum[lr]); });
  for (; i < n; ++i) {
    for (int l = 0; l < L; ++l) {
      for (int r = 0; r < R; ++r) out[l * stride + r] += lines[l * n + i] * rows[r][i];
    }
  }
}

template <int L, class T>
CODA_INLINE void dot_lines(T* out, int64_t stride, const T* lines, const T* const* rows, int64_t row_count, int64_t n) {
  int64_t r = 0;
  for (; r + 4 <= row_count; r += 4) dot_block<L, 4>(out + r, stride, lines, rows + r, n);
  for (; r < row_count; ++r) dot_block<L, 1>(out + r, stride, lines, rows + r, n);
}

template <class T>
CODA_INLINE void dot_rows_body(T* out, int64_t stride, const T* lines, int64_t count, const T* const* rows, int64_t row_count,
                               int64_t n) {
  int64_t l = 0;
  for (; l + 2 <= count; l += 2) dot_lines<2>(out + l * stride, stride, lines + l * n, rows, row_count, n);
  if (l < count) dot_lines<1>(out + l * stride, stride, lines + l * n, rows, row_count, n);
}

// V vectors of L lines, which stay in registers while all rows pass.
template <int L, int V, class T>
CODA_INLINE void sum_block(T* lines, const T* weight, int64_t stride, const T* const* rows, int64_t row_count, int64_t n,
                           int64_t i) {
  constexpr int64_t lanes = vector_lanes<T>;
  vector_t<T> sum[L * V] = {}, part[V];
  for (int64_t r = 0; r < row_count; ++r) {
    unrolled<V>([&](auto v) CODA_ALWAYS { load(part[v], rows[r] + i + v * lanes); });
    unrolled<L * V>([&](auto lv) CODA_ALWAYS { sum[lv] += weight[lv / V * stride + r] * part[lv % V]; });
  }
  unrolled<L * V>([&](auto lv) CODA_ALWAYS {
    std::memcpy(lines + lv / V * n + i + lv % V * lanes, &sum[lv], sizeof sum[lv]);
  });
}

template <int L, class T>
CODA_INLINE void sum_lines(T* lines, const T* weight, int64_t stride, const T* const* rows, int64_t row_count, int64_t n) {
  constexpr int64_t lanes = vector_lanes<T>;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) sum_block<L, 4>(lines, weight, stride, rows, row_count, n, i);
  for (; i + lanes <= n; i += lanes) sum_block<L, 1>(lines, weight, stride, rows, row_count, n, i);
  for (; i < n; ++i) {
    for (int64_t l = 0; l < L; ++l) {
      T total = 0;
      for (int64_t r = 0; r < row_count; ++r) total += weight[l * stride + r] * rows[r][i];
      lines[l * n + i] = total;
    }
  }
}

template <class T>
CODA_INLINE void sum_rows_body(T* lines, int64_t count, const T* weight, int64_t stride, const T* const* rows, int64_t row_count,
                               int64_t n) {
  int64_t l = 0;
  for (; l + 2 <= count; l += 2) sum_lines<2>(lines + l * n, weight + l * stride, stride, rows, row_count, n);
  if (l < count) sum_lines<1>(lines + l * n, weight + l * stride, stride, rows, row_count, n);
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

CODA_TARGET_CLONES void dot_rows(float* out, int64_t stride, const float* lines, int64_t count, const float* const* rows,
                                 int64_t row_count, int64_t n) {
  dot_rows_body(out, stride, lines, count, rows, row_count, n);
}
CODA_TARGET_CLONES void dot_rows(double* out, int64_t stride, const double* lines, int64_t count, const double* const* rows,
                                 int64_t row_count, int64_t n) {
  dot_rows_body(out, stride, lines, count, rows, row_count, n);
}
CODA_TARGET_CLONES void sum_rows(float* lines, int64_t count, const float* weight, int64_t stride, const float* const* rows,
                                 int64_t row_count, int64_t n) {
  sum_rows_body(lines, count, weight, stride, rows, row_count, n);
}
CODA_TARGET_CLONES void sum_rows(double* lines, int64_t count, const double* weight, int64_t stride, const double* const* rows,
                                 int64_t row_count, int64_t n) {
  sum_rows_body(lines, count, weight, stride, rows, row_count, n);
}

CODA_TARGET_CLONES float fixed_order_dot(const float* a, const float* b, int64_t n) { return dot_body(a, b, n); }
CODA_TARGET_CLONES double fixed_order_dot(const double* a, const double* b, int64_t n) { return dot_body(a, b, n); }

}  // namespace coda::cpu
