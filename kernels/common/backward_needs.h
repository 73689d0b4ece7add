#pragma once

#include <cstddef>
#include <cstdint>

namespace coda::kernels {

// What a backward of attention needs besides its outputs.
struct BackwardNeeds {
  int64_t theta_shares;    // first dimension of theta_partial
  size_t workspace_bytes;
};

}  // namespace coda::kernels
