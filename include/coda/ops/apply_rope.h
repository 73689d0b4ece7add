#pragma once

#include <ATen/core/Tensor.h>
#include <coda/export.h>
#include <coda/options.h>

namespace coda {

// Rotary position embedding with phases in float64 and cosines and sines in float32 (float64 for float64 x), whatever the
// dtype of x. x (..., heads, D) with positions (...) int64 and inv_freq (D/2) float64; returns a tensor like x.
// attention_scaling multiplies the result, as YaRN-like RoPE variants ask. inverse turns back instead: R(-position).
CODA_API at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq,
                               double attention_scaling = 1.0, Pairs pairs = Pairs::kHalf, bool inverse = false);

}  // namespace coda
