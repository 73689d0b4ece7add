#pragma once

namespace coda::kernels {

// The storage types that kernels are instantiated for. Arithmetic is in float32, in float64 for kFloat64: the accumulation type.
enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace coda::kernels
