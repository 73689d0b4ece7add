#include "apply_rope.h"

#include "../common/launch.cuh"
#include "../common/rotation.cuh"

namespace coda::kernels {
namespace {

// A thread takes one pair of one token through all heads, so that each angle is computed once.
template <class T>
__global__ void apply_rope_kernel(ApplyRopeParams p) {
  using A = acc_t<T>;
  const int half = p.dim / 2;
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= p.rows * half) return;
  const int64_t row = index / half;
  const int i = static_cast<int>(index % half);
  const int64_t position = p.inverse ? -p.positions[row] : p.positions[row];
  const Angle<A> turn = rope_angle<A>(position, p.inv_freq[i]);
  const int first = first_of_pair(i, p.interleaved), second = second_of_pair(i, p.dim, p.interleaved);
  for (int h = 0; h < p.heads; ++h) {
    const int64_t at = (row * p.heads + h) * p.dim;
    A a = widen(static_cast<const T*>(p.x)[at + first]), b = widen(static_cast<const T*>(p.x)[at + second]);
    turn_pair(a, b, turn);
    static_cast<T*>(p.out)[at + first] = narrow<T>(a * static_cast<A>(p.scaling));
    static_cast<T*>(p.out)[at + second] = narrow<T>(b * static_cast<A>(p.scaling));
  }
}

}  // namespace

cudaError_t apply_rope(const ApplyRopeParams& params, DType dtype, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const dim3 grid(static_cast<unsigned>((params.rows * (params.dim / 2) + kThreads - 1) / kThreads));
  return dispatch(dtype, [&](auto zero) {
    return launch(apply_rope_kernel<decltype(zero)>, grid, kThreads, 0, stream, params);
  });
}

}  // namespace coda::kernels
