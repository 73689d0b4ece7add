#pragma once

#include <cstdint>

#include "ends.h"

namespace coda::kernels {

// Position of the last token before `end` that ring slot `slot` took; negative if it never took one.
__device__ inline int64_t ring_position(int64_t end, int slot, int window) {
  const int64_t back = (end - 1 - slot) % window;
  return end - 1 - (back < 0 ? back + window : back);
}

// What one sequence brings into a call over packed tokens, and the chunks that they touch.
struct Span {
  int64_t token0;  // its first token, over all sequences
  int64_t length;  // L, new tokens
  int64_t first;   // position of the first new token
  int64_t row0;    // its first chunk row (snapshot)
  int64_t chunks;  // chunk rows in use

  __device__ Span(const SequenceEnds& cu_seqlens, const int64_t* tokens_seen, int64_t n, int chunk)
      : token0(cu_seqlens[n]), length(cu_seqlens[n + 1] - token0), first(tokens_seen[n]), row0(token0 / chunk + 2 * n),
        chunks(length > 0 ? (first + length - 1) / chunk - first / chunk + 1 : 0) {}

  __device__ int64_t end() const { return first + length; }
  // First position of the i-th chunk that the new tokens touch.
  __device__ int64_t chunk_start(int64_t i, int chunk) const { return (first / chunk + i) * chunk; }
};

}  // namespace coda::kernels
