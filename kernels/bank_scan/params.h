#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/ends.h"

namespace coda::kernels {

// The memory of packed sequences over their new tokens. A stands for the accumulation type, float or, for kFloat64, double. T counts
// tokens over all N sequences; NC = T / C + 2 N chunk rows, of which sequence n owns those from cu_seqlens[n] / C + 2 n on, one per
// chunk that it touches. A flat source i of a sequence is slot i of its carried state below W + Me, else its new token i - W - Me.
// R is Hkv or 1. There are Me last_touch only with the novelty policy.
struct BankScanParams {
  int64_t sequences, tokens, chunk_rows;  // N, T, NC
  int kv_heads, dim, gate_groups;
  int window, chunk, exact_slots, summary_slots, num_sinks;
  bool novelty, has_bank_distance, rope_interleaved, refresh_on_hit, low_freq_key;
  int exact_candidates;
  double age_decay;
  double exact_threshold, summary_threshold;  // least gate logit of a candidate
  double tau_novel, tau_match, tau_spawn;

  const void* k;                   // (T, Hkv, D)
  const void* v;                   // (T, Hkv, D)
  const void* gate;                // (T, R) A, logits
  SequenceEnds cu_seqlens;         // (N + 1)
  const void* state_k;             // (N, Hkv, W + Me, D)
  const void* state_v;             // (N, Hkv, W + Me, D)
  const void* state_gate;          // (N, R, W + Me) A
  const int64_t* exact_pos;        // (N, R, Me), -1 free
  const int64_t* tokens_seen;      // (N)
  const int64_t* last_touch;       // (N, Me)
  const void* state_summary_k;     // (N, Hkv, Ms, D) A
  const void* state_summary_v;     // (N, Hkv, Ms, D) A
  const void* state_summary_mass;  // (N, Ms) A
  const void* eta_logit;           // (Hkv) A, null without summary slots
  const double* inv_freq;          // (D/2)
  // Keys as the bank holds them: see bank_keys.h. Only the summary bank reads them: k and state_k without one.
  const void* kbar;                // (T, Hkv, D)
  const void* state_kbar;          // (N, Hkv, W + Me, D)
};

struct BankScanForward : BankScanParams {
  int32_t* index;          // out (NC, R, Me). A source keeps its slot for as long as it stays
  void* summary_k;         // out (NC, Hkv, Ms, D) A
  void* summary_v;         // out (NC, Hkv, Ms, D) A
  void* summary_mass;      // out (NC, Ms) A
  int32_t* source;         // out (N, R, Me)
  int32_t* assignment;     // out (NC, C), -1 where none; null without summary slots
  void* new_k;             // out (N, Hkv, W + Me, D)
  void* new_v;             // out (N, Hkv, W + Me, D)
  void* new_gate;          // out (N, R, W + Me) A
  int64_t* new_exact_pos;  // out (N, R, Me)
  int64_t* new_last_touch;  // out (N, Me)
  int64_t* new_counts;      // out (N, 2)
  void* new_summary_k;      // out (N, Hkv, Ms, D) A
  void* new_summary_v;      // out (N, Hkv, Ms, D) A
  void* new_summary_mass;   // out (N, Ms) A
  void* workspace;          // bank_scan_workspace bytes
  const int64_t* counts;    // (N, 2)
  int64_t* new_tokens_seen;  // out (N)
};

struct BankScanBackward : BankScanParams {
  const void* summary_k;               // (NC, Hkv, Ms, D) A
  const void* summary_v;               // (NC, Hkv, Ms, D) A
  const void* summary_mass;            // (NC, Ms) A
  const int32_t* source;               // (N, R, Me)
  const int32_t* assignment;           // (NC, C)
  const void* grad_summary_k;          // (NC, Hkv, Ms, D) A
  const void* grad_summary_v;          // (NC, Hkv, Ms, D) A
  const void* grad_summary_mass;       // (NC, Ms) A
  const void* grad_new_k;              // (N, Hkv, W + Me, D)
  const void* grad_new_v;              // (N, Hkv, W + Me, D)
  const void* grad_new_gate;           // (N, R, W + Me) A
  const void* grad_new_summary_k;      // (N, Hkv, Ms, D) A
  const void* grad_new_summary_v;      // (N, Hkv, Ms, D) A
  const void* grad_new_summary_mass;   // (N, Ms) A
  void* grad_k;                        // out (T, Hkv, D) A
  void* grad_v;                        // out (T, Hkv, D) A
  void* gate_partial;                  // out (T, Hkv) A: each KV head's share of the gate gradient
  void* grad_state_k;                  // out (N, Hkv, W + Me, D) A
  void* grad_state_v;                  // out (N, Hkv, W + Me, D) A
  void* state_gate_partial;            // out (N, Hkv, W + Me) A, likewise
  void* grad_state_summary_k;          // out (N, Hkv, Ms, D) A
  void* grad_state_summary_v;          // out (N, Hkv, Ms, D) A
  void* grad_state_summary_mass;       // out (N, Ms) A
  void* eta_partial;                   // out (N, Ms, Hkv) A: sums to the gradient of eta_logit
};

// The rule of novelty_lru for batches of candidates.
struct RouteExactBankParams {
  int64_t batch;  // B
  int kv_heads, candidates, dim, slots, num_sinks;
  double tau_exact, tau_novel, tau_match;
  bool refresh_on_hit;
  const void* value;             // (B, Hkv, T, D)
  const void* gate;              // (B, T) of gate_dtype, in [0, 1]
  const int64_t* position;       // (B, T)
  const void* bank_value;        // (B, Hkv, Me, D)
  const bool* used;              // (B, Me)
  const int64_t* last_touch;     // (B, Me)
  int64_t* slot;                 // out (B, T), -1 skipped
  int64_t* action;               // out (B, T): 0 skip, 1 insert, 2 touch, 3 refresh
  int64_t* new_last_touch;       // out (B, Me)
  void* workspace;               // route_exact_bank_workspace bytes
  DType gate_dtype;
};

}  // namespace coda::kernels
