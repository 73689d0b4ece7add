#pragma once

// What follows the two softmaxes, row by row: subtraction, optional RMS norm, and their backward.

#include <cmath>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "tile_attention.h"

namespace coda::cpu {

// The optional arguments of an attention op, converted once to the accumulation type.
template <class T>
struct HeadParameters {
  at::Tensor theta_cos, theta_sin, norm;  // (H, D/2), (H, D/2), (D)
  bool two_streams, has_norm;
  double eps;
  Pairs pairs;
  T scale;

  HeadParameters(const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, int64_t dim,
                 std::optional<double> scale_, Pairs theta_pairs, double norm_eps)
      : two_streams(theta.has_value()), has_norm(norm_weight.has_value()), eps(norm_eps), pairs(theta_pairs),
        scale(static_cast<T>(scale_.value_or(1.0 / std::sqrt(static_cast<double>(dim))))) {
    if (two_streams) {
      // A plain loop: at a decode step ATen's operators on so few angles take longer than the attention itself.
      const at::Tensor angle = theta->detach().to(type_of<T>()).contiguous();
      theta_cos = at::empty_like(angle);
      theta_sin = at::empty_like(angle);
      const T* phase = angle.const_data_ptr<T>();
      T *cosine = theta_cos.data_ptr<T>(), *sine = theta_sin.data_ptr<T>();
      for (int64_t i = 0; i < angle.numel(); ++i) {
        cosine[i] = std::cos(phase[i]);
        sine[i] = std::sin(phase[i]);
      }
    }
    if (has_norm) norm = norm_weight->detach().to(type_of<T>()).contiguous();
  }

  int64_t streams() const { return two_streams ? 2 : 1; }
  const T* cos(int64_t head, int64_t dim) const { return theta_cos.data_ptr<T>() + head * dim / 2; }
  const T* sin(int64_t head, int64_t dim) const { return theta_sin.data_ptr<T>() + head * dim / 2; }
};

// y = Norm(o1 - lam o2) for one (token, head) row; o1 becomes the difference.
template <class T, class S>
void finish_row(S* y, T* o1, const T* o2, T lam, const HeadParameters<T>& p, int64_t dim) {
  if (o2) axpy_row(o1, o2, dim, -lam);
  if (!p.has_norm) return store_row(y, o1, dim);
  T square = 0;
  for (int64_t i = 0; i < dim; ++i) square += o1[i] * o1[i];
  const T rstd = T(1) / std::sqrt(square / dim + static_cast<T>(p.eps));
  const T* weight = p.norm.template data_ptr<T>();
  for (int64_t i = 0; i < dim; ++i) y[i] = static_cast<S>(o1[i] * rstd * weight[i]);
}

// Turns g, the gradient of y, into the gradient of the difference; adds to grad_norm (D).
template <class T>
void norm_backward_row(T* g, const T* diff, const HeadParameters<T>& p, int64_t dim, T* grad_norm) {
  if (!p.has_norm) return;
  const T* weight = p.norm.template data_ptr<T>();
  T square = 0, along = 0;
  for (int64_t i = 0; i < dim; ++i) {
    square += diff[i] * diff[i];
    along += g[i] * weight[i] * diff[i];
  }
  const T rstd = T(1) / std::sqrt(square / dim + static_cast<T>(p.eps));
  for (int64_t i = 0; i < dim; ++i) {
    grad_norm[i] += g[i] * diff[i] * rstd;
    g[i] = rstd * (g[i] * weight[i] - diff[i] * rstd * rstd * along / dim);
  }
}

// Fills the second stream's rows from the first's: R_theta q. head(row) gives the query head.
template <class T, class Head>
void second_stream(T* q, int64_t rows, int64_t dim, const HeadParameters<T>& p, Head head) {
  if (!p.two_streams) return;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = q + (rows + r) * dim;
    std::copy_n(q + r * dim, dim, row);
    rotate_row(row, p.cos(head(r), dim), p.sin(head(r), dim), dim, p.pairs);
  }
}

// Folds the second stream's query gradient into the first's through R_theta^T, and adds to grad_theta (H, D/2).
// q2 holds the rotated queries: d q2 / d theta is q2 turned by a quarter.
template <class T, class Head>
void second_stream_backward(T* grad_q, const T* q, int64_t rows, int64_t dim, const HeadParameters<T>& p, Head head,
                            T* grad_theta) {
  if (!p.two_streams) return;
  const int64_t half = dim / 2;
  for (int64_t r = 0; r < rows; ++r) {
    T* grad = grad_q + (rows + r) * dim;
    const T* q2 = q + (rows + r) * dim;
    T* angle = grad_theta + head(r) * half;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t a = p.pairs == Pairs::kHalf ? i : 2 * i, b = p.pairs == Pairs::kHalf ? i + half : 2 * i + 1;
      angle[i] += grad[b] * q2[a] - grad[a] * q2[b];
    }
    rotate_row(grad, p.cos(head(r), dim), p.sin(head(r), dim), dim, p.pairs, /*inverse=*/true);
    axpy_row(grad_q + r * dim, grad, dim, T(1));
  }
}

// What an attention op leaves for its caller and its backward.
template <class S>
struct AttentionOutputs {
  using T = acc_t<S>;
  at::Tensor y;        // like q
  at::Tensor o2;       // like q, or of size 0 with one stream
  at::Tensor diff;     // like q: o1 - lam o2, or of size 0 without norm
  at::Tensor lse;      // (streams, T, H) in T

  // Without `save`, y alone.
  AttentionOutputs(const at::Tensor& q, const HeadParameters<T>& p, bool save = true) {
    const auto saved = [&](bool present) { return present ? at::empty(q.sizes(), q.options()) : at::empty({0}, q.options()); };
    const int64_t heads = q.size(-2), tokens = q.numel() / (heads * q.size(-1));
    y = at::empty(q.sizes(), q.options());
    o2 = saved(save && p.two_streams);
    diff = saved(save && p.has_norm);
    lse = at::empty({save ? p.streams() : 0, tokens, heads}, q.options().dtype(type_of<T>()));
  }

  AttentionOutputs(const at::Tensor& y_, const at::Tensor& o2_, const at::Tensor& diff_, const at::Tensor& lse_)
      : y(y_.contiguous()), o2(o2_.contiguous()), diff(diff_.contiguous()), lse(lse_.contiguous()) {}

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> tensors() const { return {y, o2, diff, lse}; }

  // Ends a block of rows; at(r) is token * H + head of row r, negative for a row to leave out, lam(r) its lambda.
  template <class At, class Lam>
  void store(TileForward<T>& block, int64_t rows, int64_t dim, const HeadParameters<T>& p, At at, Lam lam) const {
    std::vector<T> row_lse(rows * p.streams());
    block.finish(row_lse.data());
    for (int64_t r = 0; r < rows; ++r) {
      if (at(r) < 0) continue;
      T* o1 = block.out + r * dim;
      const T* second = p.two_streams ? block.out + (rows + r) * dim : nullptr;
      if (o2.numel() > 0) store_row(o2.data_ptr<S>() + at(r) * dim, second, dim);
      finish_row(y.data_ptr<S>() + at(r) * dim, o1, second, lam(r), p, dim);
      if (diff.numel() > 0) store_row(diff.data_ptr<S>() + at(r) * dim, o1, dim);
      for (int64_t s = 0; s < lse.size(0); ++s) lse.data_ptr<T>()[s * lse.size(1) * lse.size(2) + at(r)] = row_lse[s * rows + r];
    }
  }
};

// What the backward of a block of rows needs before it meets keys.
template <class T>
struct RowGradients {
  T* g;                        // (rows, D): gradient of o1 - lam o2
  std::vector<T> lam, d, lse;  // (rows), (streams * rows): rowsum(g * o), (streams * rows)

  // grad_y and what the forward saved, contiguous; at and lam_of as in AttentionOutputs::store. Writes grad_lam and adds to
  // grad_norm (D).
  template <class S, class At, class Lam>
  RowGradients(T* g_, int64_t rows, int64_t dim, const HeadParameters<T>& p, const at::Tensor& grad_y,
               const AttentionOutputs<S>& saved, At at, Lam lam_of, const at::Tensor& grad_lam, T* grad_norm)
      : g(g_), lam(rows), d(rows * p.streams()), lse(rows * p.streams()) {
    const int64_t size = saved.lse.size(1) * saved.lse.size(2);
    std::vector<T> difference(dim), second(dim);
    for (int64_t r = 0; r < rows; ++r) {
      T* row = g + r * dim;
      if (at(r) < 0) {
        std::fill_n(row, dim, T(0));
        for (int64_t s = 0; s < p.streams(); ++s) lse[s * rows + r] = -std::numeric_limits<T>::infinity();
        continue;
      }
      load_row(row, grad_y.const_data_ptr<S>() + at(r) * dim, dim);
      load_row(difference.data(), (p.has_norm ? saved.diff : saved.y).template const_data_ptr<S>() + at(r) * dim, dim);
      norm_backward_row(row, difference.data(), p, dim, grad_norm);
      lam[r] = lam_of(r);
      T along_second = 0, along_diff = 0;
      for (int64_t i = 0; i < dim; ++i) along_diff += row[i] * difference[i];
      if (p.two_streams) {
        load_row(second.data(), saved.o2.template const_data_ptr<S>() + at(r) * dim, dim);
        for (int64_t i = 0; i < dim; ++i) along_second += row[i] * second[i];
        d[rows + r] = along_second;
        grad_lam.data_ptr<S>()[at(r)] = static_cast<S>(-along_second);
      }
      d[r] = along_diff + lam[r] * along_second;
      for (int64_t s = 0; s < p.streams(); ++s) lse[s * rows + r] = saved.lse.template const_data_ptr<T>()[s * size + at(r)];
    }
  }
};

}  // namespace coda::cpu
