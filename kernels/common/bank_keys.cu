#include "bank_keys.h"

#include "launch.cuh"
#include "ring.cuh"
#include "rotation.cuh"
#include "sequences.cuh"

namespace coda::kernels {
namespace {

constexpr int kWarps = 8;

// One warp a row: first the new tokens' (T * Hkv), then the state's (N * Hkv * (W + Me)).
template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) bank_keys_kernel(BankKeysParams p) {
  const int64_t new_rows = p.tokens * p.kv_heads;
  const int slots = p.window + p.exact_slots;
  int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + warp_id();
  if (row < new_rows) {
    const int64_t token = row / p.kv_heads;
    const int64_t n = find_sequence(p.sequences, token, [&](int64_t m) { return p.cu_seqlens[m]; });
    turn_back_row(static_cast<T*>(p.kbar) + row * p.dim, static_cast<const T*>(p.k) + row * p.dim, p.dim,
                  p.tokens_seen[n] + token - p.cu_seqlens[n], p.inv_freq, p.interleaved);
    return;
  }
  row -= new_rows;
  if (row >= p.sequences * p.kv_heads * slots) return;
  const int slot = static_cast<int>(row % slots);
  const T* from = static_cast<const T*>(p.state_k) + row * p.dim;
  T* to = static_cast<T*>(p.state_kbar) + row * p.dim;
  if (slot >= p.window) {
    for (int d = lane_id(); d < p.dim; d += kWarp) to[d] = from[d];
    return;
  }
  const int64_t position = ring_position(p.tokens_seen[row / slots / p.kv_heads], slot, p.window);
  if (position >= 0) turn_back_row(to, from, p.dim, position, p.inv_freq, p.interleaved);
}

}  // namespace

cudaError_t bank_keys(const BankKeysParams& params, DType dtype, cudaStream_t stream) {
  const int64_t rows = (params.tokens + params.sequences * (params.window + params.exact_slots)) * params.kv_heads;
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  return dispatch(dtype, [&](auto zero) {
    return launch(bank_keys_kernel<decltype(zero)>, grid, kWarps * kWarp, 0, stream, params);
  });
}

}  // namespace coda::kernels
