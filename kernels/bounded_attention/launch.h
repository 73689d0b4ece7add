#pragma once

#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "params.h"

namespace coda::kernels {

cudaError_t bounded_attention_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream);

// The first dimension of theta_partial.
int64_t bounded_attention_backward_row_blocks(const BoundedAttentionParams& params, DType dtype);
cudaError_t bounded_attention_backward(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
