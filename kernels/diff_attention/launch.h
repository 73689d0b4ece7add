#pragma once

#include <cuda_runtime_api.h>

#include "../common/backward_needs.h"
#include "../common/dtype.h"
#include "params.h"

// One namespace per path (../common/path.h), each with the same functions.
namespace coda::kernels {

// Any dtype and any even D up to 256. q, k and v are contiguous.
namespace portable {
cudaError_t diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream);
BackwardNeeds diff_attention_backward_needs(const DiffAttentionParams& params, DType dtype);
cudaError_t diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream);
}  // namespace portable

// bfloat16 and float16, D 64 and 128. Rows of q, k and v begin at multiples of 16 bytes.
namespace sm80 {
cudaError_t diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream);
BackwardNeeds diff_attention_backward_needs(const DiffAttentionParams& params, DType dtype);
cudaError_t diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream);
}  // namespace sm80

// The same on compute capability 9.0 alone.
namespace sm90 {
cudaError_t diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream);
BackwardNeeds diff_attention_backward_needs(const DiffAttentionParams& params, DType dtype);
cudaError_t diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream);
}  // namespace sm90

}  // namespace coda::kernels
