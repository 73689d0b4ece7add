#pragma once

#include <cuda_runtime_api.h>

#include "../common/backward_needs.h"
#include "../common/dtype.h"
#include "params.h"

namespace coda::kernels {

cudaError_t bounded_attention_prepare(const BoundedAttentionPrepare& params, DType dtype, cudaStream_t stream);

// Any dtype and any even D up to 256.
namespace portable {
cudaError_t bounded_attention_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream);
BackwardNeeds bounded_attention_backward_needs(const BoundedAttentionParams& params, DType dtype);
cudaError_t bounded_attention_backward(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream);
}  // namespace portable

// bfloat16 and float16, D 64 and 128, a positive scale. Queries, keys, values, their states and summaries begin at multiples of 16
// bytes.
namespace sm80 {
BackwardNeeds bounded_attention_backward_needs(const BoundedAttentionParams& params, DType dtype);
cudaError_t bounded_attention_backward(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream);
}  // namespace sm80

// The same on compute capability 9.0 alone.
namespace sm90 {
cudaError_t bounded_attention_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream);
}  // namespace sm90

}  // namespace coda::kernels
