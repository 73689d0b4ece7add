#pragma once

#include "scan_view.cuh"

namespace coda::kernels {

// What scans do not write of chunk row `row` of sequence n: all of it where no chunk uses it, else the assignment of who is no
// candidate, which they write afterwards. Retention takes care of its index. Block `part` of `parts`; the assignment is the first
// one's.
template <class T>
__device__ inline void clear_row(const BankScanForward& p, int64_t n, int64_t row, int part, int parts) {
  const auto fill = [&](void* rows, int64_t words, int32_t word, int block, int blocks) {
    auto* const to = static_cast<int32_t*>(rows) + row * words;
    const bool wide = (reinterpret_cast<uintptr_t>(to) % 16 | words % 4) == 0;
    const int step = blocks * static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int64_t i = block * blockDim.x + threadIdx.x; i < (wide ? words / 4 : words); i += step) {
      if (wide) {
        reinterpret_cast<int4*>(to)[i] = {word, word, word, word};
      } else {
        to[i] = word;
      }
    }
  };
  if (p.summary_slots > 0 && part == 0) fill(p.assignment, p.chunk, -1, 0, 1);
  if (const Span span(p.cu_seqlens, p.tokens_seen, n, p.chunk); row < span.row0 + span.chunks) return;
  if (p.novelty) fill(p.index, p.exact_slots, -1, part, parts);
  const int64_t words = static_cast<int64_t>(p.summary_slots) * (sizeof(acc_t<T>) / sizeof(int32_t));
  fill(p.summary_k, words * p.kv_heads * p.dim, 0, part, parts);
  fill(p.summary_v, words * p.kv_heads * p.dim, 0, part, parts);
  fill(p.summary_mass, words, 0, part, parts);
}

}  // namespace coda::kernels
