#pragma once

#include "../../common/workspace.cuh"
#include "../scan_view.cuh"
#include "dots.cuh"
#include "steps.h"

namespace coda::kernels::sm90 {

constexpr int kExactCandidates = kTileRows;  // of a chunk, the most

struct BankScan : BankScanForward {
  Banks banks;
};

// What can be said of a chunk's candidates without the banks, for all chunk rows that evict.
struct CandidateLists {
  int tokens;           // row length of the summary lists
  int* exact_source;    // (NC, 2, 8) flat sources, -1 beyond the last; then offsets among the evicted tokens
  float* exact_norm;    // (NC, Hkv, 8)
  float* exact_gram;    // (NC, 8, 8) mean cosines among them
  int* summary_count;   // (NC)
  int* summary_source;  // (NC, tokens)
  int* summary_offset;  // (NC, tokens)
  float* summary_gate;  // (NC, tokens)
  float* summary_norm;  // (NC, Hkv, tokens)

  __host__ __device__ CandidateLists(Carver& carver, const BankScanParams& p, Banks banks) : tokens((p.chunk + 3) / 4 * 4) {
    const int64_t exact_rows = banks.exact ? p.chunk_rows : 0, rows = banks.summary ? p.chunk_rows : 0;
    exact_source = carver.take<int>(exact_rows * 2 * kExactCandidates);
    exact_norm = carver.take<float>(exact_rows * p.kv_heads * kExactCandidates);
    exact_gram = carver.take<float>(exact_rows * kExactCandidates * kExactCandidates);
    summary_count = carver.take<int>(rows);
    summary_source = carver.take<int>(rows * tokens);
    summary_offset = carver.take<int>(rows * tokens);
    summary_gate = carver.take<float>(rows * tokens);
    summary_norm = carver.take<float>(rows * p.kv_heads * tokens);
  }
};

cudaError_t list_candidates(const BankScan& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm90
