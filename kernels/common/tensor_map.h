#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace coda::kernels {

// Describes a tensor of 16-bit elements to the copy engine: `rank` dimensions from the contiguous one outwards, strides in elements of
// all but that one, and the box that one load brings. Its rows are 128 or 64 bytes, and lie in shared memory under the swizzle of
// that width.
struct TensorMapShape {
  int rank;
  uint64_t sizes[5];
  int64_t strides[4];
  uint32_t box[5];
};

cudaError_t make_tensor_map(CUtensorMap& map, const void* base, DType dtype, const TensorMapShape& shape);

}  // namespace coda::kernels
