#include "backward.cuh"

namespace coda::kernels::sm90 {

cudaError_t key_blocks_d128_bf16(const BackwardArguments& p, cudaStream_t stream) {
  return launch_key_blocks<__nv_bfloat16, 128>(p, stream);
}

}  // namespace coda::kernels::sm90
