#include <kernels/apply_rope/apply_rope.h>
#include <torch/library.h>

#include "../check.h"
#include "launch.h"

namespace coda::cuda {
namespace {

at::Tensor apply_rope(const at::Tensor& x_, const at::Tensor& positions_, const at::Tensor& inv_freq_,
                      double attention_scaling, std::string_view pairs, bool inverse) {
  check_apply_rope(x_, positions_, inv_freq_);
  const auto turned = parse_pairs(std::string(pairs));
  const c10::cuda::CUDAGuard guard(x_.device());
  const auto positions = positions_.contiguous(), inv_freq = inv_freq_.contiguous();
  // A view where one stride leads from token to token, as in a slice of a wider projection.
  auto x = x_.reshape({positions.numel(), x_.size(-2), x_.size(-1)});
  if (x.stride(-1) != 1) x = x.contiguous();
  auto out = at::empty(x_.sizes(), x_.options());
  kernels::ApplyRopeParams p{};
  p.rows = positions.numel();
  p.heads = static_cast<int>(x.size(1));
  p.dim = static_cast<int>(x.size(2));
  p.row_stride = x.stride(0);
  p.head_stride = x.stride(1);
  p.scaling = attention_scaling;
  p.interleaved = interleaved(turned);
  p.inverse = inverse;
  p.x = read(x);
  p.positions = read<int64_t>(positions);
  p.inv_freq = read<double>(inv_freq);
  p.out = data(out);
  C10_CUDA_CHECK(kernels::apply_rope(p, dtype_of(x), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) { m.impl("apply_rope", apply_rope); }

}  // namespace coda::cuda
