#include "forward.h"

#include "../launch.h"

namespace coda::kernels {

cudaError_t sm90::bounded_attention_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  return params.dim == 64 ? bounded::forward_d64(params, dtype, stream) : bounded::forward_d128(params, dtype, stream);
}

}  // namespace coda::kernels
