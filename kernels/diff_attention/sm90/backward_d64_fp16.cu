#include "backward.cuh"

namespace coda::kernels::sm90 {

cudaError_t key_blocks_d64_fp16(const BackwardArguments& p, cudaStream_t stream) {
  return launch_key_blocks<__half, 64>(p, stream);
}

}  // namespace coda::kernels::sm90
