#pragma once

#include "../../common/workspace.cuh"
#include "../scan_view.cuh"
#include "routing.cuh"
#include "steps.h"

namespace coda::kernels::sm90 {

// What one head needs of a chunk's candidates for the exact bank, copied as one piece.
template <class T, int kDim>
struct alignas(16) ExactCandidates {
  T value[kTileRows * kDim];                // packed for a warp
  float norm[kTileRows];
  uint32_t gram[kTileRows * kTileRows];     // keys of the mean cosines among them
  uint32_t before[kTileRows * kTileRows];   // and with those of the chunk before
  int source[kTileRows], offset[kTileRows];  // flat source, and offset among the evicted tokens; -1 beyond the last
};

// Where the summary bank's block of one head finds a candidate; any row beyond the last.
struct alignas(16) CandidateRows {
  const void *key, *value;
};

// What can be said of a chunk's candidates without the banks, for all chunk rows that evict.
struct CandidateLists {
  int tokens;           // row length of the summary lists
  unsigned char* exact;  // (NC, Hkv) ExactCandidates
  int* summary_count;   // (NC)
  CandidateRows* summary_rows;  // (NC, Hkv, tokens)
  int* summary_offset;  // (NC, tokens)
  float* summary_gate;  // (NC, tokens)
  float* summary_norm;  // (NC, Hkv, tokens)

  __host__ __device__ CandidateLists(Carver& carver, const BankScanParams& p, Banks banks) : tokens((p.chunk + 3) / 4 * 4) {
    const int64_t exact_rows = banks.exact ? p.chunk_rows : 0, rows = banks.summary ? p.chunk_rows : 0;
    const size_t bytes = p.dim == 64 ? sizeof(ExactCandidates<__half, 64>) : sizeof(ExactCandidates<__half, 128>);
    exact = carver.take<unsigned char>(exact_rows * p.kv_heads * bytes);
    summary_count = carver.take<int>(rows);
    summary_rows = carver.take<CandidateRows>(rows * p.kv_heads * tokens);
    summary_offset = carver.take<int>(rows * tokens);
    summary_gate = carver.take<float>(rows * tokens);
    summary_norm = carver.take<float>(rows * p.kv_heads * tokens);
  }

  template <class T, int kDim>
  __device__ ExactCandidates<T, kDim>& of(int64_t row, int heads, int head) const {
    return reinterpret_cast<ExactCandidates<T, kDim>*>(exact)[row * heads + head];
  }
};

constexpr int kScanThreads = 512;  // of a block of either bank

struct BankScan : BankScanForward {
  Banks banks;
  CandidateLists lists;  // in the workspace
};

cudaError_t list_candidates(const BankScan& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm90
