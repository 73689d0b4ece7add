#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace coda::kernels {

// Several pieces of memory filled at once, each with a 32-bit word of its own.
struct FillParams {
  static constexpr int kPieces = 16;
  struct Piece {
    void* to;        // at a multiple of 16 bytes
    int64_t bytes;   // a multiple of 4
    uint32_t word;
    int64_t blocks;  // that come before it; set by `fill`
  };
  int count;
  Piece piece[kPieces];
};

cudaError_t fill(const FillParams& params, cudaStream_t stream);

}  // namespace coda::kernels
