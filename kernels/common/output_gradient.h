#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace coda::kernels {

// The step between a layer's output gradient and its two softmaxes: through the norm and the subtraction. A stands for the
// accumulation type, float or, for kFloat64, double; S for the storage type; T counts tokens over all sequences.
struct OutputGradientParams {
  int64_t tokens;  // T
  int heads, dim;
  double norm_eps;
  const void* grad_y;       // (T, H, D) S
  const void* y;            // (T, H, D) S; read where diff is null
  const void* o2;           // (T, H, D) S, or null with one stream
  const void* diff;         // (T, H, D) S, or null without norm
  const void* lam;          // (T, H) A, or null with one stream
  const void* norm_weight;  // (D) A or null
  void* grad_diff;          // out (T, H, D) S: gradient of o1 - lam o2; null without norm, where it is grad_y
  void* delta;              // out (streams, T, H) A: rowsum(grad_diff * o1), rowsum(grad_diff * o2)
  void* weight_partial;     // out (output_gradient_blocks, D) A: sums to the gradient of norm_weight; null without norm
};

int64_t output_gradient_blocks(int64_t tokens, int heads);
cudaError_t output_gradient(const OutputGradientParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
