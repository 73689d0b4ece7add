#pragma once

#include "numeric.cuh"

namespace coda::kernels {

// Division by a number that the host knows, where a chain of steps waits for the quotient.
struct Divisor {
  int by;
  uint32_t factor, shift;
  double inverse;

  Divisor() : Divisor(1) {}
  explicit Divisor(int divisor) : by(divisor), factor(0), shift(0), inverse(1.0 / divisor) {
    while ((int64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>(((int64_t{1} << 32) * ((int64_t{1} << shift) - by)) / by + 1);
  }
  // From 0 on.
  __device__ int quotient(int x) const { return static_cast<int>((__umulhi(x, factor) + x) >> shift); }
  // From 0 on, below 2^52: the product is off by one at most.
  __device__ int64_t quotient(int64_t x) const {
    if (x >> 31 == 0) return quotient(static_cast<int>(x));
    const auto near = static_cast<int64_t>(static_cast<double>(x) * inverse);
    const int64_t rest = x - near * by;
    return near + (rest >= by) - (rest < 0);
  }
};

// The last n in [0, count) with start(n) <= index, where start is non-decreasing and start(0) <= index.
template <class Start>
__device__ inline int64_t find_sequence(int64_t count, int64_t index, Start start) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (start(middle) <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The same by one warp: every lane looks at one sequence, where a binary search would wait for memory again and again.
template <class Start>
__device__ inline int find_sequence_together(int64_t count, int64_t index, Start start) {
  int n = 0;
  for (int left = static_cast<int>(count) - 1; left > 0;) {
    const int step = (left + kWarp - 1) / kWarp, ahead = (lane_id() + 1) * step;
    const bool passed = ahead <= left && start(n + ahead) <= index;
    const int by = __popc(__ballot_sync(kAllLanes, passed)) * step;
    n += by;
    left = min(left - by, step - 1);
  }
  return n;
}

// Packed sequences cut into tiles of `size` items without a host copy of their lengths: sequence n owns the tiles from
// offset(n) / size + n on, which never overlap the next one's. tile_bound is their number, from tensor sizes alone.
inline int64_t tile_bound(int64_t items, int64_t sequences, int64_t size) { return items / size + sequences; }

struct Tile {
  int64_t sequence;
  int64_t begin;  // first item, within the sequence
};

template <class Offset>
__device__ inline Tile find_tile(int64_t sequences, int64_t index, int64_t size, Offset offset) {
  const int64_t n = find_sequence(sequences, index, [&](int64_t m) { return offset(m) / size + m; });
  return {n, (index - (offset(n) / size + n)) * size};
}

}  // namespace coda::kernels
