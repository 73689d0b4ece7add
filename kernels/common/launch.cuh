#pragma once

#include <cuda_runtime.h>

#include "dtype.h"
#include "numeric.cuh"

namespace coda::kernels {

// The least shared memory per block that a device of compute capability 8.0 or later can give.
constexpr size_t kSharedLimit = 99 * 1024;

// The most warps of a block, 8 at most, whose shared memory stays within the limit.
inline int fit_warps(size_t fixed_bytes, size_t bytes_per_warp) {
  int warps = 8;
  while (warps > 1 && fixed_bytes + warps * bytes_per_warp > kSharedLimit) warps /= 2;
  return warps;
}

// 10 * major + minor of the current device, 0 where there is none.
inline int device_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared, cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    const auto status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, threads, shared, stream>>>(params);
  return cudaGetLastError();
}

// Calls f with a value of the storage type.
template <class F>
cudaError_t dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace coda::kernels
