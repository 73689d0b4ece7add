#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "../memory_args.h"
#include "epilogue.h"
#include "memory.h"
#include "tile_attention.h"

namespace coda::cpu {
namespace {

constexpr int64_t kQueryTokens = 64;
constexpr int64_t kKeyTile = 512;

struct Span {
  int64_t q0, q1, k0, k1;
  int64_t shift() const { return (k1 - k0) - (q1 - q0); }  // lower-right causal
};

std::vector<Span> spans_of(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& cu_q,
                           const std::optional<at::Tensor>& cu_k) {
  std::vector<Span> spans;
  if (cu_q) {
    const auto a = packed_ends("cu_seqlens_q", *cu_q, q.size(0)), b = packed_ends("cu_seqlens_k", *cu_k, k.size(0));
    for (size_t n = 0; n + 1 < a.size(); ++n) spans.push_back({a[n], a[n + 1], b[n], b[n + 1]});
  } else {
    for (int64_t n = 0; n < q.size(0); ++n) spans.push_back({n * q.size(1), (n + 1) * q.size(1), n * k.size(1), (n + 1) * k.size(1)});
  }
  return spans;
}

// Everything one block of query tokens of one KV head needs.
template <class S>
struct Problem {
  using T = acc_t<S>;
  at::Tensor q, k, v, lam;  // contiguous
  std::vector<Span> spans;
  HeadParameters<T> head;
  int64_t heads, kv_heads, group, dim;
  bool causal;

  Problem(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const std::optional<at::Tensor>& lam_,
          const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
          const std::optional<at::Tensor>& cu_q, const std::optional<at::Tensor>& cu_k, bool causal_,
          std::optional<double> scale, std::string_view theta_pairs, double norm_eps)
      : q(q_.contiguous()), k(k_.contiguous()), v(v_.contiguous()), spans(spans_of(q_, k_, cu_q, cu_k)),
        head(theta, norm_weight, q_.size(-1), scale, parse_pairs(std::string(theta_pairs)), norm_eps), heads(q_.size(-2)),
        kv_heads(k_.size(-2)), group(heads / kv_heads), dim(q_.size(-1)), causal(causal_) {
    if (lam_) lam = lam_->contiguous();
  }

  int64_t tokens() const { return q.numel() / (heads * dim); }

  void load_queries(T* to, int64_t kv, int64_t t0, int64_t t1) const {
    const int64_t rows = (t1 - t0) * group;
    for (int64_t r = 0; r < rows; ++r) {
      load_row(to + r * dim, q.data_ptr<S>() + row(kv, t0, r) * dim, dim);
      scale_row(to + r * dim, dim, head.scale);
    }
    second_stream(to, rows, dim, head, [&](int64_t r) { return kv * group + r % group; });
  }

  void load_keys(T* to, const at::Tensor& from, int64_t kv, int64_t k0, int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) load_row(to + j * dim, from.data_ptr<S>() + ((k0 + j) * kv_heads + kv) * dim, dim);
  }

  // How many leading keys of the tile at k0 (relative to the span) each row sees.
  void visible_keys(std::vector<int64_t>& visible, const Span& span, int64_t t0, int64_t rows, int64_t k0, int64_t keys) const {
    visible.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t last = causal ? t0 + r / group - span.q0 + span.shift() : span.k1 - span.k0 - 1;
      visible[r] = std::clamp<int64_t>(last + 1 - k0, 0, keys);
    }
  }

  int64_t keys_seen(const Span& span, int64_t t1) const {
    const int64_t all = span.k1 - span.k0;
    return causal ? std::clamp<int64_t>(t1 - span.q0 + span.shift(), 0, all) : all;
  }

  // token * H + head of row r of the block that begins at token t0.
  int64_t row(int64_t kv, int64_t t0, int64_t r) const { return (t0 + r / group) * heads + kv * group + r % group; }
  T lam_of(int64_t at_row) const { return head.two_streams ? static_cast<T>(lam.template const_data_ptr<S>()[at_row]) : T(0); }
};

template <class S>
AttentionOutputs<S> forward(const Problem<S>& p, bool save) {
  using T = acc_t<S>;
  AttentionOutputs<S> out(p.q, p.head, save);
  struct Unit {
    size_t span;
    int64_t kv, t0, t1;
  };
  std::vector<Unit> units;
  for (size_t n = 0; n < p.spans.size(); ++n) {
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      for (int64_t t = p.spans[n].q0; t < p.spans[n].q1; t += kQueryTokens) {
        units.push_back({n, kv, t, std::min(t + kQueryTokens, p.spans[n].q1)});
      }
    }
  }
  at::parallel_for(0, units.size(), 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode no_autograd;
    Scratch<T> q_buffer, k_buffer, v_buffer;
    std::vector<int64_t> visible;
    for (int64_t u = begin; u < end; ++u) {
      const auto [n, kv, t0, t1] = units[u];
      const Span& span = p.spans[n];
      const int64_t rows = (t1 - t0) * p.group, streams = p.head.streams(), seen = p.keys_seen(span, t1);
      T* q = q_buffer.take(rows * streams * p.dim);
      p.load_queries(q, kv, t0, t1);
      TileForward<T> block(rows, streams, p.dim);
      for (int64_t k0 = 0; k0 < seen; k0 += kKeyTile) {
        const int64_t keys = std::min(kKeyTile, seen - k0);
        T *k = k_buffer.take(kKeyTile * p.dim), *v = v_buffer.take(kKeyTile * p.dim);
        p.load_keys(k, p.k, kv, span.k0 + k0, keys);
        p.load_keys(v, p.v, kv, span.k0 + k0, keys);
        p.visible_keys(visible, span, t0, rows, k0, keys);
        block.attend(q, {k, v, keys, nullptr, visible.data()});
      }
      const auto at_row = [&, t0 = t0, kv = kv](int64_t r) { return p.row(kv, t0, r); };
      out.store(block, rows, p.dim, p.head, at_row, [&](int64_t r) { return p.lam_of(at_row(r)); });
    }
  });
  return out;
}

template <class S>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const Problem<S>& p, const at::Tensor& grad_y, const AttentionOutputs<S>& saved) {
  using T = acc_t<S>;
  const at::TensorOptions wide = p.q.options().dtype(type_of<T>());
  const at::Tensor grad = grad_y.contiguous();
  at::Tensor grad_q = at::empty_like(p.q), grad_k = at::zeros_like(p.k), grad_v = at::zeros_like(p.v);
  at::Tensor grad_lam = p.head.two_streams ? at::empty_like(p.lam) : at::empty({0}, p.q.options());
  const int64_t units = p.spans.size() * p.kv_heads, half = p.dim / 2;
  // One partial sum per (sequence, KV head), added in a fixed order: the result does not depend on the number of threads.
  at::Tensor grad_theta = at::zeros({units, p.head.two_streams ? p.heads : 0, half}, wide);
  at::Tensor grad_norm = at::zeros({units, p.dim}, wide);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode no_autograd;
    Scratch<T> q_buffer, k_buffer, v_buffer, g_buffer, gq_buffer, gk_buffer, gv_buffer;
    std::vector<int64_t> visible;
    for (int64_t u = begin; u < end; ++u) {
      const Span& span = p.spans[u / p.kv_heads];
      const int64_t kv = u % p.kv_heads, all = span.k1 - span.k0, streams = p.head.streams();
      T *k = k_buffer.take(all * p.dim), *v = v_buffer.take(all * p.dim);
      T *gk = gk_buffer.take(all * p.dim), *gv = gv_buffer.take(all * p.dim);
      p.load_keys(k, p.k, kv, span.k0, all);
      p.load_keys(v, p.v, kv, span.k0, all);
      std::fill_n(gk, all * p.dim, T(0));
      std::fill_n(gv, all * p.dim, T(0));
      T* theta_sum = p.head.two_streams ? grad_theta.data_ptr<T>() + u * p.heads * half : nullptr;
      T* norm_sum = grad_norm.data_ptr<T>() + u * p.dim;
      for (int64_t t0 = span.q0; t0 < span.q1; t0 += kQueryTokens) {
        const int64_t t1 = std::min(t0 + kQueryTokens, span.q1), rows = (t1 - t0) * p.group, seen = p.keys_seen(span, t1);
        T *q = q_buffer.take(rows * streams * p.dim), *g = g_buffer.take(rows * p.dim);
        T* gq = gq_buffer.take(rows * streams * p.dim);
        std::fill_n(gq, rows * streams * p.dim, T(0));
        p.load_queries(q, kv, t0, t1);
        const auto at_row = [&](int64_t r) { return p.row(kv, t0, r); };
        RowGradients<T> row(g, rows, p.dim, p.head, grad, saved, at_row, [&](int64_t r) { return p.lam_of(at_row(r)); },
                            grad_lam, norm_sum);
        TileBackward<T> block(rows, streams, p.dim, g, row.d.data(), row.lam.data(), row.lse.data());
        for (int64_t k0 = 0; k0 < seen; k0 += kKeyTile) {
          const int64_t keys = std::min(kKeyTile, seen - k0);
          p.visible_keys(visible, span, t0, rows, k0, keys);
          block.attend(q, {k + k0 * p.dim, v + k0 * p.dim, keys, nullptr, visible.data()}, gq, gk + k0 * p.dim,
                       gv + k0 * p.dim, nullptr);
        }
        second_stream_backward(gq, q, rows, p.dim, p.head, [&](int64_t r) { return kv * p.group + r % p.group; }, theta_sum);
        for (int64_t r = 0; r < rows; ++r) {
          scale_row(gq + r * p.dim, p.dim, p.head.scale);
          store_row(grad_q.data_ptr<S>() + at_row(r) * p.dim, gq + r * p.dim, p.dim);
        }
      }
      for (int64_t j = 0; j < all; ++j) {
        const int64_t at_row = ((span.k0 + j) * p.kv_heads + kv) * p.dim;
        store_row(grad_k.data_ptr<S>() + at_row, gk + j * p.dim, p.dim);
        store_row(grad_v.data_ptr<S>() + at_row, gv + j * p.dim, p.dim);
      }
    }
  });
  return {grad_q, grad_k, grad_v, grad_lam, grad_theta.sum(0), grad_norm.sum(0)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> diff_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
    CODA_ATTENTION_PARAMS, bool save) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "coda::diff_attention", [&] {
    return forward(Problem<scalar_t>(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal, CODA_ATTENTION_ARGS),
                   save)
        .tensors();
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> diff_attention_backward(
    const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, const at::Tensor& y, const at::Tensor& o2, const at::Tensor& diff,
    const at::Tensor& lse, bool causal, CODA_ATTENTION_PARAMS) {
  auto [grad_q, grad_k, grad_v, grad_lam, grad_theta, grad_norm] =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "coda::diff_attention", [&] {
        return backward(Problem<scalar_t>(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal,
                                          CODA_ATTENTION_ARGS),
                        grad_y, AttentionOutputs<scalar_t>(y, o2, diff, lse));
      });
  const auto none = at::empty({0}, grad_theta.options());
  return {grad_q, grad_k, grad_v, grad_lam, theta ? grad_theta.to(theta->scalar_type()) : none,
          norm_weight ? grad_norm.to(norm_weight->scalar_type()) : none};
}

std::tuple<std::string, std::string> diff_attention_path(const at::Tensor& /*q*/, std::optional<double> /*scale*/) {
  return {"cpu", "q is on the CPU"};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) {
  m.impl("diff_attention_path", diff_attention_path);
  m.impl("_diff_attention_forward", diff_attention_forward);
  m.impl("_diff_attention_backward", diff_attention_backward);
}

}  // namespace coda::cpu
