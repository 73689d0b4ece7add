#include "backward.h"

#include "../launch.h"
#include "tiles.cuh"

namespace coda::kernels::sm80 {

BackwardNeeds diff_attention_backward_needs(const DiffAttentionParams& params, DType) {
  if (params.streams == 1) return {0, 0};
  return {query_blocks(params), sizeof(uint16_t) * static_cast<size_t>(params.queries * params.heads * params.dim)};
}

cudaError_t diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream) {
  const auto status = backward_rows(params, dtype, stream);
  return status == cudaSuccess ? backward_keys(params, dtype, stream) : status;
}

}  // namespace coda::kernels::sm80
