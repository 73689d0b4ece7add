#include "forward.cuh"
#include "forward.h"

namespace coda::kernels::sm90::bounded {

cudaError_t forward_d128(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  return launch_forward_d<128>(params, dtype, stream);
}

}  // namespace coda::kernels::sm90::bounded
