#pragma once

#include "../launch.h"

namespace coda::kernels::portable {

// The workspace holds gradients of keys and values as the exact banks hold them; zero before.
struct BoundedBackward : BoundedAttentionBackward {
  void* bank_grad_k;        // (T, Hkv, D) A
  void* bank_grad_v;        // (T, Hkv, D) A
  void* state_bank_grad_k;  // (N, Hkv, W + Me, D) A
  void* state_bank_grad_v;  // (N, Hkv, W + Me, D) A
};

// The steps of the backward, in this order: the window adds what the exact banks gathered.
int64_t bounded_backward_row_blocks(const BoundedAttentionParams& params, DType dtype);
cudaError_t bounded_backward_rows(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_bank(const BoundedBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_backward_window(const BoundedBackward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::portable
