#include <torch/library.h>

#include "../check.h"
#include "../memory_args.h"
#include "like.h"

namespace coda::meta {
namespace {

at::Tensor decode_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                        const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                        const at::Tensor& gate, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
                        const at::Tensor& inv_freq, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  check_decode_step(q, k, v, lam, theta, norm_weight, gate, state, eta_logit, inv_freq, CODA_MEMORY_OPTIONS);
  CODA_ATTENTION_OPTIONS;
  return contiguous_like(q);
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, Meta, m) { m.impl("decode_step_", decode_step_); }

}  // namespace coda::meta
