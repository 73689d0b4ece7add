#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <coda/export.h>

namespace coda {

// The bounded memory of one layer for N sequences. Slots [0, W) of k, v and gate are the ring (position p in slot p mod W),
// slots [W, W + Me) the exact bank. R gate groups: Hkv with per-head gates, 1 with a shared gate.
// Tensors that a configuration does not use have a dimension of size 0, never a missing entry.
struct CODA_API State {
  at::Tensor k;             // (N, Hkv, W + Me, D) model dtype; ring: rotated keys, exact: as semantics of bank_distance say
  at::Tensor v;             // (N, Hkv, W + Me, D) model dtype
  at::Tensor gate;          // (N, R, W + Me) float32 (float64 for a float64 model), gate logits
  at::Tensor exact_pos;     // (N, R, Me) int64, absolute position of the token in an exact slot, -1 where free
  at::Tensor tokens_seen;   // (N) int64
  at::Tensor last_touch;    // (N, Me) int64 with novelty_lru, (N, 0) with retention
  at::Tensor counts;        // (N, 2) int64: tokens inserted into the exact bank (summed over groups), candidates found known
  at::Tensor summary_k;     // (N, Hkv, Ms, D) float32 (float64 for a float64 model)
  at::Tensor summary_v;     // (N, Hkv, Ms, D) likewise
  at::Tensor summary_mass;  // (N, Ms) likewise, 0 where free

  static constexpr size_t kFields = 10;
  std::vector<at::Tensor> tensors() const;
  static State from_tensors(at::TensorList tensors);

  // Bytes held on the device: the true total over all tensors.
  int64_t nbytes() const;
};

// An empty memory. kv_options carries the dtype and device of keys and values.
CODA_API State make_state(int64_t sequences, int64_t num_kv_heads, int64_t head_dim, int64_t window, int64_t exact_slots,
                          int64_t summary_slots, int64_t gate_groups, bool novelty_lru, const at::TensorOptions& kv_options);

}  // namespace coda
