#pragma once

// What each op accepts. Every function throws c10::ValueError with one sentence that names the argument, what it was and what is
// supported; none reads tensor data. The kernels of apply_rope, route_exact_bank and decode_step_ call theirs first, for every
// device; the other ops are checked before they reach a device.

#include <optional>

#include <ATen/core/Tensor.h>
#include <coda/options.h>

namespace coda {

void check_apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq);

void check_diff_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                          const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
                          const std::optional<at::Tensor>& cu_seqlens_k);

void check_route_exact_bank(const at::Tensor& value, const at::Tensor& gate, const at::Tensor& position,
                            const at::Tensor& bank_value, const at::Tensor& used, const at::Tensor& last_touch,
                            int64_t num_sinks);

void check_bank_scan(const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens,
                     at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                     const MemoryOptions& memory);

void check_bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                             const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                             const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                             const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                             const at::Tensor& inv_freq, const MemoryOptions& memory);

void check_bounded_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                           const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                           const std::optional<at::Tensor>& cu_seqlens, at::TensorList state,
                           const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                           const MemoryOptions& memory, int64_t segment);

void check_decode_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                       const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                       const at::Tensor& gate, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
                       const at::Tensor& inv_freq, const MemoryOptions& memory);

}  // namespace coda
