#pragma once

#include "dtype.h"

namespace coda::kernels {

// Each serves all that a later one serves.
enum class Path { kPortable, kSm80, kSm90 };

struct PathChoice {
  Path path;
  const char* reason;
};

// Which kernels serve an attention op, and why. `capability` is 10 * major + minor of the device.
inline PathChoice attention_path(int capability, DType dtype, int dim, double scale) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return {Path::kPortable, "float32 and float64 have no tensor-core path of their own precision"};
  }
  if (dim != 64 && dim != 128) return {Path::kPortable, "tensor-core paths serve head dimensions 64 and 128"};
  if (!(scale > 0.0)) return {Path::kPortable, "tensor-core paths need a positive scale"};
  if (capability == 90) return {Path::kSm90, "wgmma and TMA of compute capability 9.0"};
  if (capability >= 80) return {Path::kSm80, "mma.sync; the sm90 path needs compute capability 9.0"};
  return {Path::kPortable, "tensor-core paths need compute capability 8.0 or later"};
}

}  // namespace coda::kernels
