#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace coda::kernels {

struct ApplyRopeParams {
  int64_t rows;  // tokens
  int heads, dim;
  double scaling;  // factor on the result
  bool interleaved, inverse;
  int64_t row_stride, head_stride;  // of x, in elements; a row's are neighbours
  const void* x;                    // (rows, heads, D)
  const int64_t* positions;         // (rows)
  const double* inv_freq;           // (D/2)
  void* out;                        // (rows, heads, D)
};

cudaError_t apply_rope(const ApplyRopeParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
