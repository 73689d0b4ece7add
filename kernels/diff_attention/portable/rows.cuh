#pragma once

#include "../../common/attention_rows.cuh"
#include "../../common/sequences.cuh"
#include "../params.h"

namespace coda::kernels {

__device__ inline int64_t query_offset(const DiffAttentionParams& p, int64_t n) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[n] : n * p.length_q;
}
__device__ inline int64_t key_offset(const DiffAttentionParams& p, int64_t n) {
  return p.cu_seqlens_k ? p.cu_seqlens_k[n] : n * p.length_k;
}

// Sequence n as one KV head sees it. Row r is token r / G and head r % G of the group.
struct Sequence {
  int64_t query0, key0;    // first token of each, over all sequences
  int64_t queries, keys;
  int64_t rows;            // queries * G
  int group, head0;
  bool causal;

  __device__ Sequence(const DiffAttentionParams& p, int64_t n, int kv_head)
      : query0(query_offset(p, n)), key0(key_offset(p, n)), queries(query_offset(p, n + 1) - query0),
        keys(key_offset(p, n + 1) - key0), group(p.heads / p.kv_heads), head0(kv_head * group), causal(p.causal) {
    rows = queries * group;
  }

  __device__ int head(int64_t row) const { return head0 + static_cast<int>(row % group); }
  // token * H + head: the index of a row in (Tq, H).
  __device__ int64_t at(int64_t row, int heads) const { return (query0 + row / group) * heads + head(row); }
  // Keys that a row sees: the leading ones.
  __device__ int64_t visible(int64_t row) const {
    if (row >= rows) return 0;
    if (!causal) return keys;
    const int64_t count = row / group + keys - queries + 1;
    return count < 0 ? 0 : count;
  }
};

// Row tiles of every sequence, for grid.x.
inline int64_t row_blocks(const DiffAttentionParams& p, int block_rows) {
  return tile_bound(p.queries * (p.heads / p.kv_heads), p.sequences, block_rows);
}

}  // namespace coda::kernels
