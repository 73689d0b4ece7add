#pragma once

#include <cstdint>

namespace coda::kernels {

// Differential attention over packed sequences; dense batches are sequences of equal length. A stands for the accumulation type,
// float or, for kFloat64, double. Tq and Tk count tokens over all sequences, streams is 1 or 2.
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

  const void* q;            // (Tq, H, D)
  const void* k;            // (Tk, Hkv, D)
  const void* v;            // (Tk, Hkv, D)
  const void* lam;          // (Tq, H) A, null with one stream
  const void* theta;        // (H, D/2) A, null with one stream
  const void* norm_weight;  // (D) A or null
};

struct DiffAttentionForward : DiffAttentionParams {
  void* y;     // out (Tq, H, D)
  void* o2;    // out (Tq, H, D) A, null with one stream
  void* diff;  // out (Tq, H, D) A: o1 - lam o2, null without norm
  void* lse;   // out (streams, Tq, H) A
};

struct DiffAttentionBackward : DiffAttentionParams {
  const void* lse;        // (streams, Tq, H) A
  const void* grad_diff;  // (Tq, H, D) A, from output_gradient
  const void* delta;      // (streams, Tq, H) A, likewise
  void* grad_q;           // out (Tq, H, D)
  void* grad_k;           // out (Tk, Hkv, D)
  void* grad_v;           // out (Tk, Hkv, D)
  void* theta_partial;    // out (backward row blocks, H, D/2) A, zero before: sums to grad_theta; null with one stream
};

}  // namespace coda::kernels
