#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "ends.h"

namespace coda::kernels {

// Every key that can stand in a bank, as the bank holds it (semantics 3.7), so that attention and routing read rows untouched.
struct BankKeysParams {
  int64_t tokens, sequences;  // T, N
  int kv_heads, dim, window, exact_slots;
  bool interleaved;
  const void* k;               // (T, Hkv, D)
  const void* state_k;         // (N, Hkv, W + Me, D): the ring is turned back, the exact slots are copied
  SequenceEnds cu_seqlens;     // (N + 1)
  const int64_t* tokens_seen;  // (N), before these tokens
  const double* inv_freq;      // (D/2)
  void* kbar;                  // out (T, Hkv, D)
  void* state_kbar;            // out (N, Hkv, W + Me, D); ring slots never written stay undefined
};

cudaError_t bank_keys(const BankKeysParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
