#pragma once

// Chunk rows (snapshots) and the row tiles of their queries, which every path counts alike.

#include "../common/sequences.cuh"
#include "params.h"

namespace coda::kernels {

__device__ inline int64_t sequence_of_row(const BoundedAttentionParams& p, int64_t row) {
  return find_sequence(p.sequences, row, [&](int64_t n) { return p.cu_seqlens[n] / p.chunk + 2 * n; });
}

// Row tiles of every chunk row, for grid.x.
__host__ __device__ inline int64_t tiles_per_chunk(const BoundedAttentionParams& p, int block_rows) {
  const int64_t rows = (p.chunk < p.tokens ? p.chunk : p.tokens) * (p.heads / p.kv_heads);
  return (rows + block_rows - 1) / block_rows;
}

}  // namespace coda::kernels
