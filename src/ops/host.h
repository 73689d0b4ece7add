#pragma once

// What the host code of every device needs.

#include <cmath>
#include <limits>
#include <vector>

#include <ATen/core/Tensor.h>
#include <coda/state.h>

namespace coda {

// A state whose tensors are contiguous, for reading.
inline State contiguous_state(at::TensorList tensors) {
  std::vector<at::Tensor> held;
  held.reserve(tensors.size());
  for (const auto& t : tensors) held.push_back(t.contiguous());
  return State::from_tensors(held);
}

// The gate logit at which sigmoid equals `gate`.
inline double logit(double gate) {
  return gate <= 0.0 ? -std::numeric_limits<double>::infinity() : std::log(gate / (1.0 - gate));
}

}  // namespace coda
