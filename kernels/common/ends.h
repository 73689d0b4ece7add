#pragma once

#include <cstdint>

namespace coda::kernels {

// Where each of the packed sequences begins, and at N where the last one ends.
struct SequenceEnds {
  const int64_t* cu_seqlens;  // (N + 1), null where all sequences have
  int64_t length;             // tokens: then no kernel has to write it

  constexpr int64_t operator[](int64_t n) const { return cu_seqlens ? cu_seqlens[n] : n * length; }
};

}  // namespace coda::kernels
