#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <coda/ops/bounded.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "check.h"
#include "dispatch.h"

namespace coda {

std::tuple<at::Tensor, std::vector<at::Tensor>> dispatch::bounded_read(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
    CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("coda::_bounded_read", "").typed<decltype(dispatch::bounded_read)>();
  return op.call(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_ARGS,
                 CODA_ATTENTION_ARGS);
}

namespace {

using Result = std::tuple<at::Tensor, std::vector<at::Tensor>>;

Result bounded_read_explicit(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                             const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                             const at::Tensor& gate, const at::Tensor& cu_seqlens, at::TensorList state,
                             const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                             CODA_ATTENTION_PARAMS) {
  auto [index, summary_k, summary_v, summary_mass, after, source, assignment] =
      dispatch::bank_scan_forward(k, v, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_ARGS);
  auto y = std::get<0>(dispatch::bounded_attention_forward(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index,
                                                           summary_k, summary_v, summary_mass, inv_freq, CODA_MEMORY_ARGS,
                                                           CODA_ATTENTION_ARGS, /*save=*/false));
  return {y, after};
}

// 0, length, 2 length, ...: one launch where the numbers are known; where they are symbols, of which a compiler could not tell how
// many that gives, two for it to fuse.
at::Tensor ends_of(const c10::SymInt& rows, const c10::SymInt& length, const at::TensorOptions& options) {
  const auto known_rows = rows.maybe_as_int(), known_length = length.maybe_as_int();
  if (!known_rows || !known_length) return at::arange(rows + 1, options).mul(length);
  return at::arange(0, (*known_rows + 1) * *known_length, *known_length, options);
}

Result bounded_forward_composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                                 const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                                 const std::optional<at::Tensor>& cu_seqlens, at::TensorList state,
                                 const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
                                 CODA_ATTENTION_PARAMS, int64_t segment) {
  check_bounded_forward(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS,
                        segment);
  if (q.sym_numel() == 0) {
    std::vector<at::Tensor> unchanged;
    for (const auto& t : state) unchanged.push_back(t.clone());
    return {q.clone(), unchanged};
  }
  const bool dense = !cu_seqlens;
  const auto pack = [&](const at::Tensor& t) { return dense ? t.flatten(0, 1) : t; };
  const auto packed_q = pack(q), packed_k = pack(k), packed_v = pack(v);
  const auto packed_gate = pack(gate);
  const auto packed_lam = lam ? std::optional(pack(*lam)) : std::nullopt;
  // Rows [from, to) of the packed batch, into `place` where that is given; `cu` counts from `from`.
  const auto read = [&](const c10::SymInt& from, const c10::SymInt& to, const at::Tensor& cu, at::TensorList before,
                        const at::Tensor& place) -> Result {
    const auto rows = [&](const at::Tensor& t) { return t.slice_symint(0, from, to); };
    const auto queries = rows(packed_q), keys = rows(packed_k), values = rows(packed_v);
    const auto logits = rows(packed_gate).to(state[2].scalar_type());
    const auto lambdas = packed_lam ? std::optional(rows(*packed_lam)) : std::nullopt;
    if (!place.defined() && !at::GradMode::is_enabled()) {
      return dispatch::bounded_read(queries, keys, values, lambdas, theta, norm_weight, logits, cu, before, eta_logit, inv_freq,
                                    CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
    }
    auto [index, summary_k, summary_v, summary_mass, after] =
        dispatch::bank_scan(keys, values, logits, cu, before, eta_logit, inv_freq, CODA_MEMORY_ARGS);
    if (place.defined()) {
      dispatch::bounded_attention_into(place, queries, keys, values, lambdas, theta, norm_weight, logits, cu, before, index,
                                       summary_k, summary_v, summary_mass, inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
      return {place, after};
    }
    auto y = dispatch::bounded_attention(queries, keys, values, lambdas, theta, norm_weight, logits, cu, before, index, summary_k,
                                         summary_v, summary_mass, inv_freq, CODA_MEMORY_ARGS, CODA_ATTENTION_ARGS);
    return {y, after};
  };

  const auto tokens = packed_q.sym_size(0);
  const int64_t cut = (std::min(segment, std::numeric_limits<int64_t>::max() / 2) + chunk - 1) / chunk * chunk;
  // Of sequences of one length: no kernel has to write where they end.
  const auto even = at::empty({0}, q.options().dtype(at::kLong));
  if (tokens <= cut) {
    auto [y, after] = read(0, tokens, dense ? even : *cu_seqlens, state, {});
    return {dense ? y.view_symint(q.sym_sizes()) : y, after};
  }
  const bool alone = dense && q.sym_size(0) == 1;
  const auto ends = alone ? even : dense ? ends_of(q.sym_size(0), q.sym_size(1), even.options()) : *cu_seqlens;
  const int64_t segments = ((tokens + (cut - 1)) / cut).guard_int(__FILE__, __LINE__);
  // Outputs are joined at the end where autograd has to see it. Elsewhere each is written in its place, and a long input takes
  // no more memory beside its output than a segment.
  const bool joined = at::GradMode::is_enabled();
  const auto y = joined ? at::Tensor() : at::empty_symint(packed_q.sym_sizes(), packed_q.options());
  std::vector<at::Tensor> ys, held = state.vec();
  for (int64_t i = 0; i < segments; ++i) {
    const c10::SymInt from = i * cut, to = i + 1 < segments ? c10::SymInt((i + 1) * cut) : tokens;
    auto [piece, after] = read(from, to, alone ? even : ends.clamp(i * cut, (i + 1) * cut).sub(i * cut), held,
                               joined ? at::Tensor() : y.slice_symint(0, from, to));
    if (joined) ys.push_back(piece);
    held = after;
  }
  const auto whole = joined ? at::cat(ys) : y;
  return {dense ? whole.view_symint(q.sym_sizes()) : whole, held};
}

}  // namespace

std::tuple<at::Tensor, State> bounded_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const std::optional<at::Tensor>& cu_seqlens, const State& state, const std::optional<at::Tensor>& eta_logit,
    const at::Tensor& inv_freq, const MemoryOptions& memory, const AttentionOptions& attention, int64_t segment) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coda::bounded_forward", "")
                             .typed<decltype(bounded_forward_composite)>();
  auto [y, new_state] = op.call(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state.tensors(), eta_logit, inv_freq,
                                CODA_MEMORY_VALUES(memory), CODA_ATTENTION_VALUES(attention), segment);
  return {y, State::from_tensors(new_state)};
}

TORCH_LIBRARY_IMPL(coda, CompositeImplicitAutograd, m) { m.impl("bounded_forward", bounded_forward_composite); }
TORCH_LIBRARY_IMPL(coda, CompositeExplicitAutograd, m) { m.impl("_bounded_read", bounded_read_explicit); }

}  // namespace coda
