#pragma once

#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "params.h"

namespace coda::kernels {

cudaError_t diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream);

// The first dimension of theta_partial.
int64_t diff_attention_backward_row_blocks(const DiffAttentionParams& params, DType dtype);
cudaError_t diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
