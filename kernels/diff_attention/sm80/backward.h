#pragma once

#include <cuda_runtime_api.h>

#include "../../common/dtype.h"
#include "../params.h"

// The two halves of the backward, each compiled on its own. The rows come first: they leave q2 in the workspace.
namespace coda::kernels::sm80 {

cudaError_t backward_rows(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream);
cudaError_t backward_keys(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm80
