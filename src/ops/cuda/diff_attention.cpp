#include <kernels/diff_attention/launch.h>
#include <torch/library.h>

#include "../memory_args.h"
#include "launch.h"

namespace coda::cuda {
namespace {

// The arguments in the form that kernels take; keeps the tensors alive.
struct Problem {
  at::Tensor q, k, v, lam, theta, norm_weight, cu_q, cu_k;
  kernels::DiffAttentionParams params{};

  Problem(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const std::optional<at::Tensor>& lam_,
          const std::optional<at::Tensor>& theta_, const std::optional<at::Tensor>& norm_weight_,
          const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
          const AttentionOptions& options)
      : q(q_.contiguous()), k(k_.contiguous()), v(v_.contiguous()), lam(widened(lam_, q_)), theta(widened(theta_, q_)),
        norm_weight(widened(norm_weight_, q_)) {
    auto& p = params;
    p.heads = static_cast<int>(q.size(-2));
    p.kv_heads = static_cast<int>(k.size(-2));
    p.dim = static_cast<int>(q.size(-1));
    p.queries = q.numel() / (q.size(-2) * q.size(-1));
    p.keys = k.numel() / (k.size(-2) * k.size(-1));
    if (cu_seqlens_q) {
      cu_q = int64(*cu_seqlens_q);
      cu_k = int64(*cu_seqlens_k);
      p.sequences = cu_q.size(0) - 1;
    } else {
      p.sequences = q.size(0);
      p.length_q = q.size(1);
      p.length_k = k.size(1);
    }
    p.cu_seqlens_q = read<int64_t>(cu_q);
    p.cu_seqlens_k = read<int64_t>(cu_k);
    p.streams = lam_ ? 2 : 1;
    p.causal = causal;
    p.theta_interleaved = interleaved(options.theta_pairs);
    p.scale = scale_of(options, p.dim);
    p.norm_eps = options.norm_eps;
    p.q = read(q);
    p.k = read(k);
    p.v = read(v);
    p.lam = read(lam);
    p.theta = read(theta);
    p.norm_weight = read(norm_weight);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
    CODA_ATTENTION_PARAMS) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Problem problem(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal, CODA_ATTENTION_OPTIONS);
  const auto saved = [&](bool present) { return present ? at::empty(q.sizes(), wide(q)) : at::empty({0}, wide(q)); };
  const auto y = at::empty(q.sizes(), q.options()), o2 = saved(lam.has_value()), diff = saved(norm_weight.has_value());
  const auto lse = at::empty({problem.params.streams, problem.params.queries, q.size(-2)}, wide(q));
  auto p = with_outputs<kernels::DiffAttentionForward>(problem.params);
  p.y = data(y);
  p.o2 = data(o2);
  p.diff = data(diff);
  p.lse = data(lse);
  C10_CUDA_CHECK(kernels::diff_attention_forward(p, dtype_of(q), c10::cuda::getCurrentCUDAStream()));
  return {y, o2, diff, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, const at::Tensor& y, const at::Tensor& o2, const at::Tensor& diff,
    const at::Tensor& lse_, bool causal, CODA_ATTENTION_PARAMS) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Problem problem(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal, CODA_ATTENTION_OPTIONS);
  const auto out = output_gradient(grad_y.contiguous(), y.contiguous(), o2.contiguous(), diff.contiguous(), problem.lam,
                                   problem.norm_weight, norm_eps);
  const auto lse = lse_.contiguous();
  const auto grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()),
             grad_v = at::empty(v.sizes(), v.options());
  const auto dtype = dtype_of(q);
  auto p = with_outputs<kernels::DiffAttentionBackward>(problem.params);
  const auto theta_partial =
      theta ? at::zeros({kernels::diff_attention_backward_row_blocks(p, dtype), p.heads, p.dim / 2}, wide(q))
            : at::empty({0}, wide(q));
  p.lse = read(lse);
  p.grad_diff = read(out.grad_diff);
  p.delta = read(out.delta);
  p.grad_q = data(grad_q);
  p.grad_k = data(grad_k);
  p.grad_v = data(grad_v);
  p.theta_partial = data(theta_partial);
  C10_CUDA_CHECK(kernels::diff_attention_backward(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return {grad_q,
          grad_k,
          grad_v,
          gradient_like(out.grad_lam, lam),
          gradient_like(theta ? theta_partial.sum(0) : theta_partial, theta),
          gradient_like(out.grad_norm_weight, norm_weight)};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) {
  m.impl("_diff_attention_forward", forward);
  m.impl("_diff_attention_backward", backward);
}

}  // namespace coda::cuda
