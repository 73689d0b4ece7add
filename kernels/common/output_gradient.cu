#include "output_gradient.h"

#include "attention_tiles.cuh"
#include "launch.cuh"

namespace coda::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerWarp = 8;
constexpr int kRowsPerBlock = kWarps * kRowsPerWarp;

template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) output_gradient_kernel(OutputGradientParams p) {
  using A = acc_t<T>;
  const auto* grad_y = static_cast<const T*>(p.grad_y);
  const auto* y = static_cast<const T*>(p.y);
  const auto* o2 = static_cast<const A*>(p.o2);
  const auto* diff = static_cast<const A*>(p.diff);
  const auto* lam = static_cast<const A*>(p.lam);
  const auto* weight = static_cast<const A*>(p.norm_weight);
  auto* out = static_cast<A*>(p.grad_diff);
  auto* delta = static_cast<A*>(p.delta);
  const int dim = p.dim;
  const int64_t rows = p.tokens * p.heads;
  A grad_weight[kVec] = {};
  for (int step = 0; step < kRowsPerWarp; ++step) {
    const int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + step * kWarps + warp_id();
    if (row >= rows) break;
    const int64_t at = row * dim;
    A g[kVec], d[kVec];
    for_elements(dim, [&](int i, int e) {
      g[i] = widen(grad_y[at + e]);
      d[i] = diff ? diff[at + e] : static_cast<A>(widen(y[at + e]));
    });
    if (weight) {
      A square = A(0), along = A(0);
      for_elements(dim, [&](int i, int e) {
        square += d[i] * d[i];
        along += weight[e] * g[i] * d[i];
      });
      const A rstd = A(1) / sqrt(warp_sum(square) / dim + static_cast<A>(p.norm_eps));
      const A pull = warp_sum(along) * rstd * rstd * rstd / dim;
      for_elements(dim, [&](int i, int e) {
        grad_weight[i] += g[i] * d[i] * rstd;
        g[i] = g[i] * weight[e] * rstd - d[i] * pull;
      });
    }
    const A lambda = lam ? lam[row] : A(0);
    A delta1 = A(0), delta2 = A(0);
    for_elements(dim, [&](int i, int e) {
      const A second = lam ? o2[at + e] : A(0);
      delta1 += g[i] * (d[i] + lambda * second);
      delta2 += g[i] * second;
      out[at + e] = g[i];
    });
    delta1 = warp_sum(delta1);
    delta2 = warp_sum(delta2);
    if (lane_id() == 0) {
      delta[row] = delta1;
      if (lam) delta[rows + row] = delta2;
    }
  }
  if (!weight) return;
  __shared__ A share[kWarps][kMaxDim];
  for_elements(dim, [&](int i, int e) { share[warp_id()][e] = grad_weight[i]; });
  __syncthreads();
  for (int e = threadIdx.x; e < dim; e += blockDim.x) {
    A sum = A(0);
    for (int w = 0; w < kWarps; ++w) sum += share[w][e];
    static_cast<A*>(p.weight_partial)[static_cast<int64_t>(blockIdx.x) * dim + e] = sum;
  }
}

}  // namespace

int64_t output_gradient_blocks(int64_t tokens, int heads) { return (tokens * heads + kRowsPerBlock - 1) / kRowsPerBlock; }

cudaError_t output_gradient(const OutputGradientParams& params, DType dtype, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(output_gradient_blocks(params.tokens, params.heads)));
  return dispatch(dtype, [&](auto zero) {
    return launch(output_gradient_kernel<decltype(zero)>, grid, kWarps * kWarp, 0, stream, params);
  });
}

}  // namespace coda::kernels
