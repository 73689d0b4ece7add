#pragma once

#include <cuda_runtime_api.h>

#include "../../common/dtype.h"
#include "../params.h"

// What the files of this path share: one function for each head dimension, compiled on its own.
namespace coda::kernels::sm90::bounded {

cudaError_t forward_d64(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream);
cudaError_t forward_d128(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm90::bounded
