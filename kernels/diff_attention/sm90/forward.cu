#include "../launch.h"

#include "forward.h"

namespace coda::kernels {

cudaError_t sm90::diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream) {
  if (params.queries == 0) return cudaSuccess;
  return params.dim == 64 ? forward_d64(params, dtype, stream) : forward_d128(params, dtype, stream);
}

}  // namespace coda::kernels
