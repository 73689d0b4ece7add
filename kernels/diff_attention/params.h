#pragma once

#include <cstdint>

namespace coda::kernels {

// Elements between neighbours of a tensor (sequence, token, head, D) whose last dimension is contiguous.
struct Strides {
  int64_t sequence;  // 0 in a packed batch
  int64_t token, head;
};

// Differential attention over packed sequences; dense batches are sequences of equal length. T stands for the storage type, A for
// the accumulation type, float or, for kFloat64, double. Tq and Tk count tokens over all sequences, streams is 1 or 2.
struct DiffAttentionParams {
  int64_t sequences;           // N
  int64_t queries, keys;       // Tq, Tk
  const int64_t* cu_seqlens_q;  // (N + 1), or null: sequence n is [n * length_q, (n + 1) * length_q)
  const int64_t* cu_seqlens_k;  // (N + 1), or null likewise
  int64_t length_q, length_k;
  int heads, kv_heads, dim, streams;
  bool causal;             // lower-right: the last query sees the last key
  bool theta_interleaved;
  double scale, norm_eps;

  const void* q;            // (Tq, H, D) T
  const void* k;            // (Tk, Hkv, D) T
  const void* v;            // (Tk, Hkv, D) T
  Strides q_strides, k_strides, v_strides;
  const void* lam;          // (Tq, H) A, null with one stream
  const void* theta;        // (H, D/2) A, null with one stream
  const void* norm_weight;  // (D) A or null
};

// Outputs are contiguous. Those for the backward are null where there will be none.
struct DiffAttentionForward : DiffAttentionParams {
  void* y;     // out (Tq, H, D) T
  void* o2;    // out (Tq, H, D) T, null with one stream
  void* diff;  // out (Tq, H, D) T: o1 - lam o2, null without norm
  void* lse;   // out (streams, Tq, H) A
};

struct DiffAttentionBackward : DiffAttentionParams {
  const void* lse;        // (streams, Tq, H) A
  const void* grad_diff;  // (Tq, H, D) T, from output_gradient
  const void* delta;      // (streams, Tq, H) A, likewise
  void* grad_q;           // out (Tq, H, D) T
  void* grad_k;           // out (Tk, Hkv, D) T
  void* grad_v;           // out (Tk, Hkv, D) T
  void* theta_partial;    // out (theta_shares, H, D/2) A, zero before: sums to grad_theta; null with one stream
  void* workspace;        // workspace_bytes, uninitialised
};

}  // namespace coda::kernels
