#pragma once

// Attention of one block of query rows over key tiles, the part that dense and bounded attention share on the CPU. Rows are the
// (token, head of the group) pairs of one KV head; a second stream doubles them. GEMMs are ATen's, called from inside
// at::parallel_for, where they run on one thread. Everything is copied into aligned scratch first, so that a row's bits do not
// depend on where its batch lies in memory.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <coda/options.h>

#include "vector_math.h"

namespace coda::cpu {

// float64 for float64 tensors, float32 for everything else.
template <class scalar_t>
using acc_t = at::opmath_type<scalar_t>;

template <class T>
at::ScalarType type_of() {
  return std::is_same_v<T, double> ? at::kDouble : at::kFloat;
}

template <class T, class S>
void load_row(T* to, const S* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

template <class S, class T>
void store_row(S* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);
}

// A grow-only aligned buffer of one thread.
template <class T>
class Scratch {
 public:
  T* take(int64_t n) {
    if (!buffer_.defined() || buffer_.numel() < n) buffer_ = at::empty({n}, at::TensorOptions().dtype(type_of<T>()));
    return buffer_.template data_ptr<T>();
  }

 private:
  at::Tensor buffer_;
};

// A row-major matrix view, or its transpose, for gemm.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  bool transposed = false;
  Matrix t() const { return {data, rows, cols, !transposed}; }
  at::Tensor tensor() const {
    auto blob = at::from_blob(const_cast<std::remove_const_t<T>*>(data), {rows, cols},
                              at::TensorOptions().dtype(type_of<std::remove_const_t<T>>()));
    return transposed ? blob.t() : blob;
  }
};

// c = a b, or c += a b.
template <class T>
void gemm(Matrix<T> c, Matrix<T> a, Matrix<T> b, bool accumulate) {
  auto out = c.tensor();
  if (accumulate) {
    at::addmm_out(out, out, a.tensor(), b.tensor());
  } else {
    at::mm_out(out, a.tensor(), b.tensor());
  }
}

// Turns the planes of one row in place: angle given by its D/2 cosines and sines.
template <class T>
void rotate_row(T* x, const T* cos, const T* sin, int64_t dim, Pairs pairs, bool inverse = false) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    T& a = x[pairs == Pairs::kHalf ? i : 2 * i];
    T& b = x[pairs == Pairs::kHalf ? i + half : 2 * i + 1];
    const T s = inverse ? -sin[i] : sin[i];
    const T turned = a * cos[i] - b * s;
    b = a * s + b * cos[i];
    a = turned;
  }
}

// Cosines and sines of position * inv_freq, phases in float64.
template <class T>
void rope_angles(T* cos, T* sin, const double* inv_freq, int64_t half, int64_t position) {
  for (int64_t i = 0; i < half; ++i) {
    const double phase = static_cast<double>(position) * inv_freq[i];
    cos[i] = static_cast<T>(std::cos(phase));
    sin[i] = static_cast<T>(std::sin(phase));
  }
}

// One key tile as a block of queries sees it. k, v (keys, D) contiguous; bias (keys) or null; visible[row] counts the leading
// keys that a query row may see (null: all), the same for both streams.
template <class T>
struct KeyTile {
  const T* k;
  const T* v;
  int64_t keys;
  const T* bias = nullptr;
  const int64_t* visible = nullptr;
};

// Online softmax over key tiles for `rows` query rows and `streams` streams; queries are (streams * rows, D), scaled.
template <class T>
class TileForward {
 public:
  TileForward(int64_t rows, int64_t streams, int64_t dim) : rows_(rows), total_rows_(rows * streams), dim_(dim) {
    out = out_.take(total_rows_ * dim);
    std::fill_n(out, total_rows_ * dim, T(0));
    peak_.assign(total_rows_, -std::numeric_limits<T>::infinity());
    total_.assign(total_rows_, T(0));
  }

  void attend(T* q, const KeyTile<T>& tile) {
    if (tile.keys == 0) return;
    T* s = logits_.take(total_rows_ * tile.keys);
    gemm<T>({s, total_rows_, tile.keys}, {q, total_rows_, dim_}, Matrix<T>{const_cast<T*>(tile.k), tile.keys, dim_}.t(), false);
    for (int64_t r = 0; r < total_rows_; ++r) {
      T* row = s + r * tile.keys;
      const int64_t visible = tile.visible ? tile.visible[r % rows_] : tile.keys;
      const T peak = add_bias_and_max(row, tile.bias, visible, peak_[r]);
      if (peak == -std::numeric_limits<T>::infinity()) {
        std::fill_n(row, tile.keys, T(0));
        continue;
      }
      const T shrink = peak_[r] == peak ? T(1) : std::exp(peak_[r] - peak);
      if (shrink != T(1)) scale_row(out + r * dim_, dim_, shrink);
      total_[r] = total_[r] * shrink + exp_and_sum(row, visible, peak);
      std::fill(row + visible, row + tile.keys, T(0));
      peak_[r] = peak;
    }
    gemm<T>({out, total_rows_, dim_}, {s, total_rows_, tile.keys}, {const_cast<T*>(tile.v), tile.keys, dim_}, true);
  }

  // Divides by the softmax sums; lse (streams * rows) gets log sum exp, -inf for a row without keys, whose output is 0.
  void finish(T* lse) {
    for (int64_t r = 0; r < total_rows_; ++r) {
      if (total_[r] > 0) scale_row(out + r * dim_, dim_, T(1) / total_[r]);
      lse[r] = total_[r] > 0 ? peak_[r] + std::log(total_[r]) : -std::numeric_limits<T>::infinity();
    }
  }

  T* out;  // (streams * rows, D)

 private:
  int64_t rows_, total_rows_, dim_;
  std::vector<T> peak_, total_;
  Scratch<T> out_, logits_;
};

// The backward of the same over saved log-sum-exps: derivation in kernels/diff_attention/README.md.
template <class T>
class TileBackward {
 public:
  // g (rows, D): gradient of o1 - lam o2. d (streams * rows): rowsum(g * o). lam (rows) or null. lse (streams * rows).
  TileBackward(int64_t rows, int64_t streams, int64_t dim, T* g, const T* d, const T* lam, const T* lse)
      : rows_(rows), streams_(streams), dim_(dim), g_(g), d_(d), lam_(lam), lse_(lse) {}

  // Adds to grad_q (streams * rows, D), to grad_k and grad_v (keys, D) and, if not null, to grad_bias (keys).
  void attend(T* q, const KeyTile<T>& tile, T* grad_q, T* grad_k, T* grad_v, T* grad_bias) {
    if (tile.keys == 0) return;
    const int64_t total_rows = rows_ * streams_, keys = tile.keys;
    T* p = p_.take(total_rows * keys);
    T* dp = dp_.take(rows_ * keys);
    T* weight = weight_.take(rows_ * keys);
    const Matrix<T> k{const_cast<T*>(tile.k), keys, dim_}, v{const_cast<T*>(tile.v), keys, dim_};
    const Matrix<T> g{g_, rows_, dim_};
    gemm<T>({p, total_rows, keys}, {q, total_rows, dim_}, k.t(), false);
    gemm<T>({dp, rows_, keys}, g, v.t(), false);
    for (int64_t r = 0; r < total_rows; ++r) {
      const int64_t row = r % rows_;
      T* probability = p + r * keys;
      const int64_t visible = tile.visible ? tile.visible[row] : keys;
      const bool any = lse_[r] != -std::numeric_limits<T>::infinity();
      add_bias_and_max(probability, tile.bias, any ? visible : 0, T(0));
      exp_and_sum(probability, any ? visible : 0, lse_[r]);
      std::fill(probability + (any ? visible : 0), probability + keys, T(0));
      const T factor = r < rows_ ? T(1) : -lam_[row];
      if (r < rows_) {
        std::copy_n(probability, keys, weight + row * keys);
      } else {
        axpy_row(weight + row * keys, probability, keys, factor);
      }
      softmax_backward_row(probability, dp + row * keys, keys, factor, d_[r]);
      if (grad_bias) axpy_row(grad_bias, probability, keys, T(1));
    }
    gemm<T>({grad_v, keys, dim_}, Matrix<T>{weight, rows_, keys}.t(), g, true);
    gemm<T>({grad_k, keys, dim_}, Matrix<T>{p, total_rows, keys}.t(), {q, total_rows, dim_}, true);
    gemm<T>({grad_q, total_rows, dim_}, {p, total_rows, keys}, k, true);
  }

 private:
  int64_t rows_, streams_, dim_;
  T* g_;
  const T *d_, *lam_, *lse_;
  Scratch<T> p_, dp_, weight_;
};

}  // namespace coda::cpu
