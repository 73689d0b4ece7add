#pragma once

#include <cstdint>

#include "../common/ends.h"

namespace coda::kernels {

// Attention of new tokens over bank snapshots, ring and themselves. A stands for the accumulation type, float or, for kFloat64,
// double. T counts tokens over all N sequences, NC = T / C + 2 N chunk rows, of which sequence n owns those from
// cu_seqlens[n] / C + 2 n on. A flat source i of a sequence is slot i of its carried state below W + Me, else its new token
// i - W - Me. R is Hkv or 1.
struct BoundedAttentionParams {
  int64_t sequences, tokens, chunk_rows;  // N, T, NC
  int heads, kv_heads, dim, streams, gate_groups;
  int window, chunk, exact_slots, summary_slots, num_sinks;
  bool has_bank_distance, gate_bias, mass_bias, theta_interleaved, rope_interleaved;
  int64_t bank_distance;
  double scale, norm_eps;

  const void* q;               // (T, H, D)
  const void* k;               // (T, Hkv, D)
  const void* v;               // (T, Hkv, D)
  const void* lam;             // (T, H) A, null with one stream
  const void* theta;           // (H, D/2) A, null with one stream
  const void* norm_weight;     // (D) A or null
  const void* gate;            // (T, R) A, logits
  SequenceEnds cu_seqlens;     // (N + 1)
  const int64_t* tokens_seen;  // (N)
  const void* state_k;         // (N, Hkv, W + Me, D)
  const void* state_v;         // (N, Hkv, W + Me, D)
  const void* state_gate;      // (N, R, W + Me) A
  const int32_t* index;        // (NC, R, Me) flat source of each exact slot, -1 free. A source keeps its slot for as long as it
                               // stays in the bank, which is what lets the backward gather its gradient in one place
  const void* summary_k;       // (NC, Hkv, Ms, D) A
  const void* summary_v;       // (NC, Hkv, Ms, D) A
  const void* summary_mass;    // (NC, Ms) A, 0 free
  const double* inv_freq;      // (D/2)
  const void* kbar;            // (T, Hkv, D) keys as the bank holds them, those that the index names; k without bank_distance
  const void* state_kbar;      // (N, Hkv, W + Me, D) likewise; state_k without bank_distance
};

// What both passes begin with: keys turned back to position 0 (semantics 3.7), and lam and theta in the accumulation type.
struct BoundedAttentionPrepare : BoundedAttentionParams {
  const void* narrow_lam;    // (T, H) of the storage type, null where there is nothing to widen
  const void* narrow_theta;  // (H, D/2) likewise
  void* wide_lam;            // out (T, H) A
  void* wide_theta;          // out (H, D/2) A
  void* new_kbar;            // out (T, Hkv, D), null where no key turns. Rows that the index does not name stay undefined
  void* new_state_kbar;      // out (N, Hkv, W + Me, D) likewise
  uint32_t* claims;          // out, 0; or null
  // The kernel in front of this one is the scan's last. All inputs but the index were there before the scan began, and the
  // outputs are no memory of the scan's: what starts after that kernel has let it may read and write them while the scan still
  // runs.
  bool behind_scan;
};

struct BoundedAttentionForward : BoundedAttentionParams {
  void* y;     // out (T, H, D)
  void* o2;    // out (T, H, D) of the storage type, null with one stream or without a backward
  void* diff;  // out (T, H, D) of the storage type: o1 - lam o2, null without norm or a backward
  void* lse;   // out (streams, T, H) A, null without a backward
  // Scratch of the sm90 path: (2, NC, Hkv, Ms, D) of the storage type, at a multiple of 16 bytes; null without summary slots.
  void* summary_rounded;
  // For the sm90 path: how much of the work has been claimed, 0 before; lam and theta are of the storage type.
  uint32_t* claims;
  bool narrow_lam, narrow_theta;
  // bounded_attention_prepare has been launched with these arguments, and nothing of its outputs but the keys is used. It lets
  // the next kernel start only when all before the scan has ended, so a kernel launched early may read at once what neither the
  // scan nor the preparation makes: anything but the index, the summaries and the keys for the bank.
  bool prepared;
};

struct BoundedAttentionBackward : BoundedAttentionParams {
  const void* lse;        // (streams, T, H) A
  const void* grad_diff;  // (T, H, D) of the storage type, from output_gradient
  const void* delta;      // (streams, T, H) A, likewise
  void* grad_q;           // out (T, H, D)
  void* grad_k;           // out (T, Hkv, D)
  void* grad_v;           // out (T, Hkv, D)
  void* grad_state_k;     // out (N, Hkv, W + Me, D)
  void* grad_state_v;     // out (N, Hkv, W + Me, D)
  void* grad_summary_k;   // out (NC, Hkv, Ms, D) A, zero before
  void* grad_summary_v;   // out (NC, Hkv, Ms, D) A, zero before
  void* theta_partial;    // out (theta_shares, H, D/2) A, zero before: sums to grad_theta; null with one stream
  void* gate_partial;     // out (T, Hkv) A, zero before: gate gradient of each KV head
  void* state_gate_partial;  // out (N, Hkv, W + Me) A, zero before, likewise
  void* mass_partial;        // out (NC, Hkv, Ms) A, zero before, likewise
  void* workspace;           // workspace_bytes, uninitialised
};

}  // namespace coda::kernels
