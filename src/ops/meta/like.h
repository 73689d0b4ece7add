#pragma once

#include <optional>
#include <tuple>

#include <ATen/Functions.h>

namespace coda::meta {

inline at::Tensor contiguous_like(const at::Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); }

inline at::TensorOptions wide(const at::Tensor& t) {
  return t.options().dtype(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// The gradient of an optional input: of size 0 where the input is absent.
inline at::Tensor gradient_like(const std::optional<at::Tensor>& t, const at::TensorOptions& otherwise) {
  return t ? contiguous_like(*t) : at::empty({0}, otherwise);
}

// y, o2, diff and lse of an attention op; without `save`, y alone.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_outputs(const at::Tensor& q, bool two_streams,
                                                                                    bool norm, bool save = true) {
  const auto heads = q.sym_size(-2);
  const auto tokens = q.dim() == 4 ? q.sym_size(0) * q.sym_size(1) : q.sym_size(0);
  const auto saved = [&](bool present) {
    return save && present ? contiguous_like(q) : at::empty({0}, q.options());
  };
  return {contiguous_like(q), saved(two_streams), saved(norm),
          at::empty_symint({c10::SymInt(save ? two_streams ? 2 : 1 : 0), tokens, heads}, wide(q))};
}

}  // namespace coda::meta
