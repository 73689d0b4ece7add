#include "output_gradient.h"

#include <initializer_list>

#include "attention_tiles.cuh"
#include "fragments.cuh"
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
  const auto* difference = static_cast<const T*>(p.diff ? p.diff : p.y);
  const auto* o2 = static_cast<const T*>(p.o2);
  const auto* lam = static_cast<const A*>(p.lam);
  const auto* weight = static_cast<const A*>(p.norm_weight);
  auto* out = static_cast<T*>(p.grad_diff);
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
      d[i] = widen(difference[at + e]);
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
        // As the softmaxes' backward will read it, so that delta belongs to it.
        const T rounded = narrow<T>(g[i] * weight[e] * rstd - d[i] * pull);
        g[i] = widen(rounded);
        out[at + e] = rounded;
      });
    }
    const A lambda = lam ? lam[row] : A(0);
    A delta1 = A(0), delta2 = A(0);
    for_elements(dim, [&](int i, int e) {
      const A second = lam ? widen(o2[at + e]) : A(0);
      delta1 += g[i] * (d[i] + lambda * second);
      delta2 += g[i] * second;
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

// The same for 16-bit elements and D 64 or 128, which large layers have: a row is D/8 lanes with 16 bytes each.
template <class T, int D>
__global__ void __launch_bounds__(kWarps * kWarp) output_gradient_rows_kernel(OutputGradientParams p) {
  constexpr int kLanes = D / kPacket, kRows = kWarp / kLanes;  // of a row, of a warp at a time
  const auto* lam = static_cast<const float*>(p.lam);
  const auto* weight = static_cast<const float*>(p.norm_weight);
  auto* delta = static_cast<float*>(p.delta);
  const int64_t rows = p.tokens * p.heads;
  const int first = lane_id() % kLanes * kPacket;
  const auto row_sum = [](float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
  };
  float w[kPacket], grad_weight[kPacket] = {};
#pragma unroll
  for (int i = 0; i < kPacket; ++i) w[i] = weight ? weight[first + i] : 1.0f;
#pragma unroll 2
  for (int step = 0; step < kRowsPerWarp / kRows; ++step) {
    const int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + (step * kWarps + warp_id()) * kRows + lane_id() / kLanes;
    const bool real = row < rows;
    const int64_t at = row * D + first;
    float g[kPacket] = {}, d[kPacket] = {}, second[kPacket] = {};
    if (real) {
      load_packet(g, static_cast<const T*>(p.grad_y) + at);
      load_packet(d, static_cast<const T*>(p.diff ? p.diff : p.y) + at);
      if (lam) load_packet(second, static_cast<const T*>(p.o2) + at);
    }
    if (weight) {
      float square = 0.0f, along = 0.0f;
#pragma unroll
      for (int i = 0; i < kPacket; ++i) {
        square += d[i] * d[i];
        along += w[i] * g[i] * d[i];
      }
      const float rstd = rsqrtf(row_sum(square) / D + static_cast<float>(p.norm_eps));
      const float pull = row_sum(along) * rstd * rstd * rstd / D;
#pragma unroll
      for (int i = 0; i < kPacket; ++i) {
        grad_weight[i] += g[i] * d[i] * rstd;
        g[i] = widen(narrow<T>(g[i] * w[i] * rstd - d[i] * pull));
      }
      if (real) store_packet(static_cast<T*>(p.grad_diff) + at, g);
    }
    float along_diff = 0.0f, along_second = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      along_diff += g[i] * d[i];
      along_second += g[i] * second[i];
    }
    along_diff = row_sum(along_diff);
    along_second = row_sum(along_second);
    if (real && lane_id() % kLanes == 0) {
      delta[row] = along_diff + (lam ? lam[row] * along_second : 0.0f);
      if (lam) delta[rows + row] = along_second;
    }
  }
  if (!weight) return;
  __shared__ float share[kWarps * kRows][D];
#pragma unroll
  for (int i = 0; i < kPacket; ++i) share[warp_id() * kRows + lane_id() / kLanes][first + i] = grad_weight[i];
  __syncthreads();
  for (int e = threadIdx.x; e < D; e += blockDim.x) {
    float sum = 0.0f;
    for (int r = 0; r < kWarps * kRows; ++r) sum += share[r][e];
    static_cast<float*>(p.weight_partial)[static_cast<int64_t>(blockIdx.x) * D + e] = sum;
  }
}

// Packets are read and written where these begin.
bool in_packets(const OutputGradientParams& p) {
  for (const void* at : {p.grad_y, p.y, p.o2, p.diff, static_cast<const void*>(p.grad_diff)}) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) return false;
  }
  return true;
}

}  // namespace

int64_t output_gradient_blocks(int64_t tokens, int heads) { return (tokens * heads + kRowsPerBlock - 1) / kRowsPerBlock; }

cudaError_t output_gradient(const OutputGradientParams& params, DType dtype, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(output_gradient_blocks(params.tokens, params.heads)));
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* kernel = output_gradient_kernel<T>;
    if constexpr (sizeof(T) == 2) {
      if (params.dim == 64 && in_packets(params)) kernel = output_gradient_rows_kernel<T, 64>;
      if (params.dim == 128 && in_packets(params)) kernel = output_gradient_rows_kernel<T, 128>;
    }
    return launch(kernel, grid, kWarps * kWarp, 0, stream, params);
  });
}

}  // namespace coda::kernels
