#pragma once

// Registers and tiles that the sm90 kernels have in common.

#include "../../common/fragments.cuh"
#include "../../common/numeric.cuh"
#include "../../common/tensor_map.h"
#include "../params.h"

namespace coda::kernels::sm90 {

// A number that is the same in all lanes, in a way that the compiler knows: it then needs no register of every thread.
__device__ inline int uniform(int x) { return __reduce_max_sync(kAllLanes, x); }

// Accumulators to the register operand of the next product: 16 columns to a row of four.
template <class T, int Blocks>
__device__ inline void pack_operand(uint32_t (&to)[Blocks][4], const float (&from)[8 * Blocks]) {
#pragma unroll
  for (int i = 0; i < 4 * Blocks; ++i) to[i / 4][i % 4] = pack<T>(from[2 * i], from[2 * i + 1]);
}

// Four lanes, each with the i-th of four words of everyone: afterwards lane q has the words q of lanes 0 to 3.
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t received = __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + step], step);
      if (upper) {
        x[i] = received;
      } else {
        x[i + step] = received;
      }
    }
  }
}

// Of the current device.
inline cudaError_t multiprocessor_count(int& count) {
  int device = 0;
  const auto status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) : status;
}

// Tiles of 64 columns by `rows` tokens of one head of a tensor (sequence, token, head, D).
inline TensorMapShape head_tile(int dim, int heads, int64_t tokens, int64_t sequences, const Strides& strides, int rows) {
  return {4,
          {static_cast<uint64_t>(dim), static_cast<uint64_t>(heads), static_cast<uint64_t>(tokens),
           static_cast<uint64_t>(sequences)},
          {strides.head, strides.token, strides.sequence},
          {64, 1, static_cast<uint32_t>(rows), 1}};
}

}  // namespace coda::kernels::sm90
