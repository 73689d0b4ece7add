#pragma once

// The ops that other ops are made of, called through the dispatcher so that autograd, fake tensors and tracing see them.

#include <optional>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

#include "memory_args.h"

namespace coda::dispatch {

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq, double attention_scaling,
                      std::string_view pairs, bool inverse);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> diff_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
    CODA_ATTENTION_PARAMS, bool save);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> diff_attention_backward(
    const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, const at::Tensor& y, const at::Tensor& o2, const at::Tensor& diff,
    const at::Tensor& lse, bool causal, CODA_ATTENTION_PARAMS);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> bank_scan(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor> bank_scan_forward(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
    const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor>
bank_scan_backward(const at::Tensor& grad_summary_k, const at::Tensor& grad_summary_v, const at::Tensor& grad_summary_mass,
                   const at::Tensor& grad_new_k, const at::Tensor& grad_new_v, const at::Tensor& grad_new_gate,
                   const at::Tensor& grad_new_summary_k, const at::Tensor& grad_new_summary_v,
                   const at::Tensor& grad_new_summary_mass, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
                   const at::Tensor& cu_seqlens, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
                   const at::Tensor& inv_freq, const at::Tensor& summary_k, const at::Tensor& summary_v,
                   const at::Tensor& summary_mass, const at::Tensor& source, const at::Tensor& assignment,
                   CODA_MEMORY_PARAMS);

at::Tensor bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                             const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                             const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                             const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                             const at::Tensor& inv_freq, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bounded_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS, bool save);

// bounded_attention into y (T, H, D), contiguous, for who asks for no gradient.
void bounded_attention_into(const at::Tensor& y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                            const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                            const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
                            const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                            CODA_ATTENTION_PARAMS);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor>
bounded_attention_backward(const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                           const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                           const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                           const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                           const at::Tensor& inv_freq, const at::Tensor& y, const at::Tensor& o2, const at::Tensor& diff,
                           const at::Tensor& lse, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS);

// bank_scan and bounded_attention, for who asks for no gradient: one after the other with nothing in between.
std::tuple<at::Tensor, std::vector<at::Tensor>> bounded_read(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
    CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS);

}  // namespace coda::dispatch
