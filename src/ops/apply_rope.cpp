#include <coda/ops/apply_rope.h>

#include <ATen/core/dispatch/Dispatcher.h>

#include "dispatch.h"

namespace coda {

at::Tensor dispatch::apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq,
                                double attention_scaling, std::string_view pairs, bool inverse) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("coda::apply_rope", "").typed<decltype(dispatch::apply_rope)>();
  return op.call(x, positions, inv_freq, attention_scaling, pairs, inverse);
}

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq, double attention_scaling,
                      Pairs pairs, bool inverse) {
  return dispatch::apply_rope(x, positions, inv_freq, attention_scaling, to_string(pairs), inverse);
}

}  // namespace coda
