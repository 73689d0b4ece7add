#include <ATen/Functions.h>
#include <torch/library.h>

#include "../check.h"

namespace coda::meta {
namespace {

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq, double /*scaling*/,
                      std::string_view pairs, bool /*inverse*/) {
  check_apply_rope(x, positions, inv_freq);
  parse_pairs(std::string(pairs));
  return at::empty_symint(x.sym_sizes(), x.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Meta, m) { m.impl("apply_rope", apply_rope); }

}  // namespace coda::meta
