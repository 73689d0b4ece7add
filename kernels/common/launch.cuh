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

// Lets the kernel have more shared memory than the 48 KiB that need no asking.
inline cudaError_t allow_shared(const void* kernel, size_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared, cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const auto status = allow_shared(reinterpret_cast<const void*>(kernel), shared);
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared, stream>>>(params);
  return cudaGetLastError();
}

// Programmatic dependent launch, on 9.0; later devices run code made for 8.0, which has no such wait. A kernel launched by
// `launch_early` may start while the one before it in the stream still runs, as soon as each of that one's blocks has called
// `let_next_start` or ended. So every thread that reads or writes device memory calls `wait_for_stream` first: it returns when all
// earlier kernels have ended and their writes can be seen. A kernel in such a row calls it in every block, also where it needs
// nothing, since the next one takes its end for the end of all. Where kernels let the next one start only after their own wait, a
// kernel that starts knows that all but the one before it have ended; who makes use of that writes down why it holds.
__device__ inline void wait_for_stream() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
inline cudaLaunchAttribute early_attribute() {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}
template <class Params>
cudaError_t launch_early(void (*kernel)(Params), dim3 grid, int threads, size_t shared, cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (device_capability() != 90) return launch(kernel, grid, threads, shared, stream, params);
  const auto status = allow_shared(reinterpret_cast<const void*>(kernel), shared);
  if (status != cudaSuccess) return status;
  auto early = early_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
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
