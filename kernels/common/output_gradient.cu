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

// Pair elements of a row that a lane owns: two neighbours, 64 elements from one pair to the next.
constexpr int kPairs = kMaxDim / (2 * kWarp);

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

// f(i, d) for every even d of a row that this lane owns with d + 1; i counts them.
template <class F>
__device__ inline void for_pairs(int dim, F f) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int d = 2 * (lane_id() + i * kWarp);
    if (d < dim) f(i, d);
  }
}

template <class T>
__device__ inline void load_pairs(acc_t<T> (&to)[kPairs][2], const void* row, int64_t at, int dim) {
  for_pairs(dim, [&](int i, int d) {
    const auto pair = *reinterpret_cast<const Pair<T>*>(static_cast<const T*>(row) + at + d);
    to[i][0] = widen(pair.x);
    to[i][1] = widen(pair.y);
  });
}

// Null gives zeros.
template <class T>
__device__ inline void load_packet(float (&to)[8], const T* from) {
  const uint4 words = from ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(w[i]);
    to[2 * i] = x.x;
    to[2 * i + 1] = x.y;
  }
}

template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) output_gradient_kernel(OutputGradientParams p) {
  using A = acc_t<T>;
  const auto* lam = static_cast<const A*>(p.lam);
  const auto* weight = static_cast<const A*>(p.norm_weight);
  auto* delta = static_cast<A*>(p.delta);
  const int dim = p.dim;
  const int64_t rows = p.tokens * p.heads;
  A grad_weight[kPairs][2] = {};
  for (int step = 0; step < kRowsPerWarp; ++step) {
    const int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + step * kWarps + warp_id();
    if (row >= rows) break;
    const int64_t at = row * dim;
    A g[kPairs][2] = {}, d[kPairs][2] = {}, second[kPairs][2] = {};
    load_pairs<T>(g, p.grad_y, at, dim);
    load_pairs<T>(d, p.diff ? p.diff : p.y, at, dim);
    if (lam) load_pairs<T>(second, p.o2, at, dim);
    if (weight) {
      A square = A(0), along = A(0);
      for_pairs(dim, [&](int i, int e) {
        for (int j = 0; j < 2; ++j) {
          square += d[i][j] * d[i][j];
          along += weight[e + j] * g[i][j] * d[i][j];
        }
      });
      const A rstd = A(1) / sqrt(warp_sum(square) / dim + static_cast<A>(p.norm_eps));
      const A pull = warp_sum(along) * rstd * rstd * rstd / dim;
      for_pairs(dim, [&](int i, int e) {
        for (int j = 0; j < 2; ++j) {
          grad_weight[i][j] += g[i][j] * d[i][j] * rstd;
          // As the softmaxes' backward will read it, so that delta belongs to it.
          g[i][j] = widen(narrow<T>(g[i][j] * weight[e + j] * rstd - d[i][j] * pull));
        }
        *reinterpret_cast<Pair<T>*>(static_cast<T*>(p.grad_diff) + at + e) = {narrow<T>(g[i][0]), narrow<T>(g[i][1])};
      });
    }
    A along_diff = A(0), along_second = A(0);
    for_pairs(dim, [&](int i, int) {
      for (int j = 0; j < 2; ++j) {
        along_diff += g[i][j] * d[i][j];
        along_second += g[i][j] * second[i][j];
      }
    });
    along_diff = warp_sum(along_diff);
    along_second = warp_sum(along_second);
    if (lane_id() == 0) {
      delta[row] = along_diff + (lam ? lam[row] * along_second : A(0));
      if (lam) delta[rows + row] = along_second;
    }
  }
  if (!weight) return;
  __shared__ A share[kWarps][kMaxDim];
  for_pairs(dim, [&](int i, int e) {
    for (int j = 0; j < 2; ++j) share[warp_id()][e + j] = grad_weight[i][j];
  });
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
  constexpr int kLanes = D / 8, kRows = kWarp / kLanes;  // of a row, of a warp at a time
  const auto* lam = static_cast<const float*>(p.lam);
  const auto* weight = static_cast<const float*>(p.norm_weight);
  auto* delta = static_cast<float*>(p.delta);
  const int64_t rows = p.tokens * p.heads;
  const int first = lane_id() % kLanes * 8;
  const auto row_sum = [](float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
  };
  float w[8], grad_weight[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) w[i] = weight ? weight[first + i] : 1.0f;
#pragma unroll 2
  for (int step = 0; step < kRowsPerWarp / kRows; ++step) {
    const int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + (step * kWarps + warp_id()) * kRows + lane_id() / kLanes;
    const bool real = row < rows;
    const int64_t at = row * D + first;
    float g[8], d[8], second[8];
    load_packet<T>(g, real ? static_cast<const T*>(p.grad_y) + at : nullptr);
    load_packet<T>(d, real ? static_cast<const T*>(p.diff ? p.diff : p.y) + at : nullptr);
    load_packet<T>(second, real && lam ? static_cast<const T*>(p.o2) + at : nullptr);
    if (weight) {
      float square = 0.0f, along = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        square += d[i] * d[i];
        along += w[i] * g[i] * d[i];
      }
      const float rstd = rsqrtf(row_sum(square) / D + static_cast<float>(p.norm_eps));
      const float pull = row_sum(along) * rstd * rstd * rstd / D;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        grad_weight[i] += g[i] * d[i] * rstd;
        g[i] = widen(narrow<T>(g[i] * w[i] * rstd - d[i] * pull));
      }
      if (real) {
        const uint4 words{pack<T>(g[0], g[1]), pack<T>(g[2], g[3]), pack<T>(g[4], g[5]), pack<T>(g[6], g[7])};
        *reinterpret_cast<uint4*>(static_cast<T*>(p.grad_diff) + at) = words;
      }
    }
    float along_diff = 0.0f, along_second = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
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
  for (int i = 0; i < 8; ++i) share[warp_id() * kRows + lane_id() / kLanes][first + i] = grad_weight[i];
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
