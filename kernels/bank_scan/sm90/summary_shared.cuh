#pragma once

// Shared memory of the summary bank's scan.

#include "candidates.cuh"
#include "routing.cuh"

namespace coda::kernels::sm90 {

constexpr int kSummaryRows = 64;  // the most slots, and the most tokens of a chunk
constexpr int kGroupSlots = 32;  // that a warpgroup compares with the candidates

// What the lists say of a chunk's candidates.
struct alignas(16) CandidateList {
  CandidateRows rows[kSummaryRows];
  float gate[kSummaryRows], norm[kSummaryRows];
};

// Shared memory of one block of the summary bank's cluster, which holds one KV head.
template <class T, int kDim>
struct alignas(1024) SummaryShared {
  // Operands of the products: swizzled panels of 64 rows, which are 64 elements wide.
  static constexpr int kTileElements = kSummaryRows * kDim, kPanelBytes = kSummaryRows * 128;
  static constexpr int kLists = 4;  // of this chunk and the next three
  T direction[2][kTileElements];  // values over their norms, as sums: of 32 slots the high parts, then the low ones
  T value[3][kTileElements];      // candidates of this chunk and the next two
  float v[kSummaryRows * kDim];
  CandidateList list[kLists];
  uint32_t gram[kSummaryRows * kSummaryRows];  // keys of the mean cosines of candidates
  Match best[kSummaryRows];                    // in fixed order
  int choice[kSummaryRows];                    // what the tensor cores say of each candidate, see settle
  int open[kSummaryRows];                      // candidates to be compared in fixed order
  int slot[kSummaryRows];                      // the decision where slots were claimed
  float mass[kSummaryRows];
  float cosine[2 * kSummaryRows];  // (Hkv, owned, 128) what each head sent in fixed order: of slots, then of candidates

  // Rows of candidates that one block sums over the heads, the most; `blocks` blocks a head get them in batches.
  static __host__ __device__ int owned(int heads, int blocks) {
    const int batch = kTileRows / blocks, all = heads * blocks;
    return (kSummaryRows / batch + all - 1) / all * batch;
  }
  static __host__ __device__ size_t bytes(int heads, int blocks) {
    return offsetof(SummaryShared, cosine) + sizeof(cosine) * heads * owned(heads, blocks);
  }
};

}  // namespace coda::kernels::sm90
