#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <torch/library.h>

#include "../check.h"
#include "tile_attention.h"

namespace coda::cpu {
namespace {

template <class S>
void rotate_tokens(S* out, const S* x, const int64_t* positions, const double* inv_freq, int64_t tokens, int64_t heads,
                   int64_t dim, double scaling, Pairs pairs, bool inverse) {
  using T = acc_t<S>;
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, heads * dim));
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> cos(dim / 2), sin(dim / 2), row(dim);
    for (int64_t t = begin; t < end; ++t) {
      rope_angles(cos.data(), sin.data(), inv_freq, dim / 2, positions[t]);
      for (int64_t r = t * heads; r < (t + 1) * heads; ++r) {
        load_row(row.data(), x + r * dim, dim);
        rotate_row(row.data(), cos.data(), sin.data(), dim, pairs, inverse);
        if (scaling != 1.0) scale_row(row.data(), dim, static_cast<T>(scaling));
        store_row(out + r * dim, row.data(), dim);
      }
    }
  });
}

at::Tensor apply_rope(const at::Tensor& x_, const at::Tensor& positions_, const at::Tensor& inv_freq_,
                      double attention_scaling, std::string_view pairs, bool inverse) {
  check_apply_rope(x_, positions_, inv_freq_);
  const auto turned = parse_pairs(std::string(pairs));
  const auto x = x_.contiguous(), positions = positions_.contiguous(), inv_freq = inv_freq_.contiguous();
  auto out = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "coda::apply_rope", [&] {
    rotate_tokens(out.data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), positions.const_data_ptr<int64_t>(),
                  inv_freq.const_data_ptr<double>(), positions.numel(), x.size(-2), x.size(-1), attention_scaling, turned,
                  inverse);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) { m.impl("apply_rope", apply_rope); }

}  // namespace coda::cpu
