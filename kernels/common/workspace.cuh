#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.cuh"

namespace coda::kernels {

// Hands out 16-byte aligned arrays of one buffer; from a null buffer it only counts bytes, so that one layout function serves
// host and device.
class Carver {
 public:
  __host__ __device__ explicit Carver(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return at;
  }
  __host__ __device__ size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

// Where a block keeps arrays whose size depends on slot counts: shared memory while they fit, else a slice of a workspace in
// global memory. `bytes` is what one block needs.
__device__ inline void* block_memory(void* workspace, size_t bytes, unsigned char* shared) {
  return bytes <= kSharedLimit ? shared : static_cast<unsigned char*>(workspace) + static_cast<size_t>(blockIdx.x) * bytes;
}
inline size_t shared_part(size_t bytes) { return bytes <= kSharedLimit ? bytes : 0; }
inline size_t workspace_part(size_t bytes, int64_t blocks) {
  return bytes <= kSharedLimit ? 0 : bytes * static_cast<size_t>(blocks);
}

}  // namespace coda::kernels
