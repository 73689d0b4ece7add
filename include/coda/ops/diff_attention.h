#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <coda/export.h>
#include <coda/options.h>

namespace coda {

// Differential attention: Norm(softmax(q K^T s) V - lam * softmax(R_theta(q) K^T s) V).
// Dense: q (B, Lq, H, D), k and v (B, Lk, Hkv, D), lam (B, Lq, H). Packed: q (Tq, H, D), k and v (Tk, Hkv, D), lam (Tq, H) with
// cu_seqlens_q and cu_seqlens_k (N + 1) int32 or int64. theta (H, D/2). Without lam and theta: one stream.
// norm_weight (D) turns the RMS norm over D on. causal is lower-right: the last query sees the last key.
// Returns a tensor like q. Differentiable once in every floating-point argument.
CODA_API at::Tensor diff_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const std::optional<at::Tensor>& lam = std::nullopt,
                                   const std::optional<at::Tensor>& theta = std::nullopt,
                                   const std::optional<at::Tensor>& norm_weight = std::nullopt,
                                   const std::optional<at::Tensor>& cu_seqlens_q = std::nullopt,
                                   const std::optional<at::Tensor>& cu_seqlens_k = std::nullopt, bool causal = true,
                                   const AttentionOptions& options = {});

}  // namespace coda
