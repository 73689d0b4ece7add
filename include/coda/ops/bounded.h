#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <coda/export.h>
#include <coda/options.h>
#include <coda/state.h>

namespace coda {

// What every query chunk of a packed batch reads from the banks. Rows: sequence n owns the rows from cu_seqlens[n] / C + 2 n
// on, one per chunk that its new tokens touch, first chunk first; NC = T / C + 2 N rows in all, the unused ones free.
struct CODA_API Snapshots {
  // (NC, R, Me) int32: i < W + Me is slot i of the carried state, W + Me + j the j-th new token of the sequence, -1 free.
  at::Tensor index;
  at::Tensor summary_k;     // (NC, Hkv, Ms, D)
  at::Tensor summary_v;     // (NC, Hkv, Ms, D)
  at::Tensor summary_mass;  // (NC, Ms)
};

// Runs the memory of every sequence over its new tokens. k (T, Hkv, D) rotated at true positions, v (T, Hkv, D), gate (T, R)
// logits, cu_seqlens (N + 1), or (0) where all sequences are of one length, eta_logit (Hkv) where there are summary slots,
// inv_freq (D/2) float64.
CODA_API std::tuple<Snapshots, State> bank_scan(const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate,
                                                const at::Tensor& cu_seqlens, const State& state,
                                                const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                                                const MemoryOptions& memory);

// Attention of the new tokens over snapshots, ring and themselves. q (T, H, D) rotated, lam (T, H), theta (H, D/2); state is
// the state before these tokens. Returns (T, H, D).
CODA_API at::Tensor bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                      const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                                      const at::Tensor& cu_seqlens, const State& state, const Snapshots& snapshots,
                                      const at::Tensor& inv_freq, const MemoryOptions& memory,
                                      const AttentionOptions& attention);

// bank_scan and bounded_attention over segments of at most `segment` packed tokens (rounded up to whole chunks), so that extra
// memory is bounded. Dense (B, L, heads, D) without cu_seqlens, or packed (T, heads, D) with it.
CODA_API std::tuple<at::Tensor, State> bounded_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const std::optional<at::Tensor>& cu_seqlens, const State& state, const std::optional<at::Tensor>& eta_logit,
    const at::Tensor& inv_freq, const MemoryOptions& memory, const AttentionOptions& attention, int64_t segment = 32768);

// One token per sequence, state mutated in place: q (N, H, D), k and v (N, Hkv, D), gate (N, R), lam (N, H). No autograd.
CODA_API at::Tensor decode_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                 const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate, State& state,
                                 const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                                 const MemoryOptions& memory, const AttentionOptions& attention);

}  // namespace coda
