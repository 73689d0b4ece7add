#pragma once

#include <cstddef>
#include <cstdint>

namespace coda::kernels {

// One token per sequence on a memory that is changed in place. A stands for the accumulation type, float or, for kFloat64, double.
// R is Hkv or 1.
struct DecodeStepParams {
  int64_t sequences;  // N
  int heads, kv_heads, dim, streams, gate_groups;
  int window, chunk, exact_slots, summary_slots, num_sinks;
  bool novelty, has_bank_distance, rope_interleaved, theta_interleaved;
  bool gate_bias, mass_bias, refresh_on_hit, low_freq_key;
  int64_t bank_distance;
  int exact_candidates;
  double age_decay;
  double exact_threshold, summary_threshold;  // least gate logit of a candidate
  double tau_novel, tau_match, tau_spawn;
  double scale, norm_eps;

  const void* q;            // (N, H, D)
  const void* k;            // (N, Hkv, D)
  const void* v;            // (N, Hkv, D)
  const void* lam;          // (N, H) A, null with one stream
  const void* theta;        // (H, D/2) A, null with one stream
  const void* norm_weight;  // (D) A or null
  const void* gate;         // (N, R) A, logits
  const void* eta_logit;    // (Hkv) A, null without summary slots
  const double* inv_freq;   // (D/2)

  void* state_k;         // (N, Hkv, W + Me, D)
  void* state_v;         // (N, Hkv, W + Me, D)
  void* state_gate;      // (N, R, W + Me) A
  int64_t* exact_pos;    // (N, R, Me)
  int64_t* tokens_seen;  // (N)
  int64_t* last_touch;   // (N, Me), only with the novelty policy
  int64_t* counts;       // (N, 2)
  void* summary_k;       // (N, Hkv, Ms, D) A
  void* summary_v;       // (N, Hkv, Ms, D) A
  void* summary_mass;    // (N, Ms) A

  void* y;          // out (N, H, D)
  void* workspace;  // decode_step_workspace bytes
  void* bank_keys;  // scratch (N, C, Hkv, D), with summary slots and bank_distance
};

}  // namespace coda::kernels
