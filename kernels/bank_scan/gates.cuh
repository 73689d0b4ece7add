#pragma once

#include "../common/dtype.h"
#include "../common/numeric.cuh"

namespace coda::kernels {

// Element i of a tensor of any floating dtype.
__device__ inline double read_double(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(from)[i];
    case DType::kFloat64: return static_cast<const double*>(from)[i];
    case DType::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(from)[i]);
    case DType::kFloat16: return widen(static_cast<const __half*>(from)[i]);
  }
  return 0.0;
}

}  // namespace coda::kernels
