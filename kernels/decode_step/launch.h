#pragma once

#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "params.h"

namespace coda::kernels {

size_t decode_step_workspace(const DecodeStepParams& params, DType dtype);
cudaError_t decode_step(const DecodeStepParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
