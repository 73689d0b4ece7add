#include "forward.cuh"
#include "forward.h"

namespace coda::kernels::sm90::bounded {

cudaError_t forward_d64(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  return launch_forward_d<64>(params, dtype, stream);
}

}  // namespace coda::kernels::sm90::bounded
