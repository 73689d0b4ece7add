#pragma once

#include "launch.h"

namespace coda::kernels {

// The steps of the backward, in this order: the window adds what the exact banks gathered.
cudaError_t bounded_attention_backward_rows(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_attention_backward_bank(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream);
cudaError_t bounded_attention_backward_window(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
