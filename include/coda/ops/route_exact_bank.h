#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>
#include <coda/export.h>

namespace coda {

// What route_exact_bank decided for one candidate.
enum class RouteAction : int64_t { kSkip = 0, kInsert = 1, kTouch = 2, kRefresh = 3 };

// The novelty_lru rule for one batch of candidates, each seeing the inserts of those before it.
// value (B, Hkv, T, D), gate (B, T) in [0, 1], position (B, T) int64, in position order; bank_value (B, Hkv, Me, D),
// used (B, Me) bool, last_touch (B, Me) int64. Returns slot (B, T) int64 (-1 where skipped), action (B, T) int64
// (RouteAction) and the new last_touch (B, Me). Slots below num_sinks are never chosen.
CODA_API std::tuple<at::Tensor, at::Tensor, at::Tensor> route_exact_bank(
    const at::Tensor& value, const at::Tensor& gate, const at::Tensor& position, const at::Tensor& bank_value,
    const at::Tensor& used, const at::Tensor& last_touch, double tau_exact = 0.10, double tau_novel = 0.70,
    double tau_match = 0.90, bool refresh_on_hit = false, int64_t num_sinks = 0);

}  // namespace coda
