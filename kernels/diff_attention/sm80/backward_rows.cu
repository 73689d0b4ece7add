#include "backward.h"
#include "tiles.cuh"

namespace coda::kernels::sm80 {
namespace {

constexpr int kStepKeys = 32;  // keys of a step

template <int D, int Streams>
constexpr size_t backward_rows_shared() {
  return sizeof(uint16_t) * D * (2 * kRows + query_block_rows(Streams) + 4 * kStepKeys);
}

// Turns 16 rows of dq2 back to dq. A lane holds both elements of D / 8 planes of theta in two rows; share[i] is what they give
// to the i-th one's angle. `second` are the rows of q2.
template <int D, bool Interleaved, class T>
__device__ inline void turn_back(float (&x)[D / 8][4], float (&share)[D / 8], const T* second, const Angle<float>* angles) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    const int n_a = Interleaved ? i : i / 2, n_b = Interleaved ? i : i / 2 + D / 16;
    const int c_a = Interleaved ? 0 : i % 2, c_b = Interleaved ? 1 : i % 2;
    const Angle<float> angle = angles[Interleaved ? 4 * i + column / 2 : 8 * n_a + column + c_a];
    share[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float &a = x[n_a][2 * r + c_a], &b = x[n_b][2 * r + c_b];
      const float q_a = widen(second[place<D>(row + 8 * r, n_a) + column + c_a]);
      const float q_b = widen(second[place<D>(row + 8 * r, n_b) + column + c_b]);
      share[i] += b * q_a - a * q_b;
      turn_pair(a, b, {angle.cos, -angle.sin});
    }
  }
}

// The block's share of dtheta, from those of its lanes, in one order: over the rows of a warp, then over the warps.
template <int D, bool Interleaved>
__device__ inline void sum_theta_shares(float* partial, float (&share)[D / 8], float* warp_sums, float scale) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
#pragma unroll
    for (int lanes = 4; lanes < kWarp; lanes *= 2) share[i] += __shfl_xor_sync(kAllLanes, share[i], lanes);
    const int quad = lane_id() % 4, plane = Interleaved ? 4 * i + quad : 8 * (i / 2) + 2 * quad + i % 2;
    if (lane_id() < 4) warp_sums[warp_id() * (D / 2) + plane] = share[i];
  }
  __syncthreads();
  if (threadIdx.x < D / 2) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * (D / 2) + threadIdx.x];
    partial[threadIdx.x] = sum * scale;
  }
}

// grad_q and the shares of grad_theta; leaves q2 in the workspace for the keys.
template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 2) backward_rows_kernel(DiffAttentionBackward p) {
  constexpr int kBlock = query_block_rows(Streams), kGrads = 3 - Streams;  // grad_diff belongs to both streams
  extern __shared__ __align__(128) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  T* grads = queries + 2 * kRows * D;
  T* stages = grads + kBlock * D;

  const QueryBlock block(p, kBlock);
  if (block.rows <= 0) return;
  const int row0 = block.row0, rows = block.rows, seen = block.seen;
  const int64_t q_stride = p.q_strides.token, k_stride = p.k_strides.token, v_stride = p.v_strides.token;
  const int64_t stride = static_cast<int64_t>(p.heads) * D;  // of contiguous tensors of queries
  const T* k = block.sequence.k<T>(p, block.kv_head);
  const T* v = block.sequence.v<T>(p, block.kv_head);
  const auto load_step = [&](int key) {
    T* stage = stages + key / kStepKeys % 2 * (2 * kStepKeys * D);
    load_tile<D, kStepKeys>(stage, k + key * k_stride, k_stride, seen - key);
    load_tile<D, kStepKeys>(stage + kStepKeys * D, v + key * v_stride, v_stride, seen - key);
  };
  load_tile<D, kBlock>(queries, block.sequence.q<T>(p, block.head) + row0 * q_stride, q_stride, rows);
  load_tile<D, kBlock>(grads, static_cast<const T*>(p.grad_diff) + block.at(p, 0) * D, stride, rows);
  load_step(0);
  commit_copies();

  const LaneRows mine(block, Streams);
  float lse[2][2], delta[2][2], lam[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = mine.row(m, r);
      const int64_t at = block.at(p, row) + (Streams == 2 ? m * p.queries * p.heads : 0);
      lse[m][r] = row < rows ? static_cast<const float*>(p.lse)[at] * kLog2E : 0.0f;
      delta[m][r] = row < rows ? static_cast<const float*>(p.delta)[at] : 0.0f;
    }
    const int row = mine.row(0, r);
    lam[r] = Streams == 2 && row < rows ? static_cast<const float*>(p.lam)[block.at(p, row)] : 0.0f;
  }
  if constexpr (Streams == 2) {
    T* second = queries + kRows * D;
    wait_copies<0>();
    __syncthreads();
    turn_tile<D>(second, queries, static_cast<const float*>(p.theta) + block.head * (D / 2), p.theta_interleaved);
    __syncthreads();
    write_tile<D, kRows>(static_cast<T*>(p.workspace) + block.at(p, 0) * D, stride, rows, second, threadIdx.x, kThreads);
  }

  const float scale = static_cast<float>(p.scale), log2_scale = scale * kLog2E;
  float grad_q[2][D / 8][4] = {};
  T* lines = queries + mine.first * D;
  for (int key = 0; key < seen; key += kStepKeys) {
    wait_copies<0>();
    __syncthreads();
    if (key + kStepKeys < seen) load_step(key + kStepKeys);
    commit_copies();
    const T* keys = stages + key / kStepKeys % 2 * (2 * kStepKeys * D);
    float s[2][kStepKeys / 8][4] = {}, dp[kGrads][kStepKeys / 8][4] = {};
    multiply_rows<D>(s, lines, kRows * D, keys);
    multiply_rows<D>(dp, grads + mine.first * D, kRows * D, keys + kStepKeys * D);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kStepKeys / 2; ++i) {
        const int r = i % 4 / 2;
        float& x = s[m][i / 4][i % 4];
        x = exp2_approximate(fmaf(x, log2_scale, -lse[m][r])) * (dp[m % kGrads][i / 4][i % 4] - delta[m][r]);
        if (Streams == 2 && m == 1) x *= -lam[r];
      }
    }
    mine.hide(s, key, 0.0f);
    multiply_columns<D>(grad_q, s, keys);
  }
  wait_copies<0>();
  __syncthreads();

  if constexpr (Streams == 2) {
    auto* angles = reinterpret_cast<Angle<float>*>(stages);
    auto* warp_sums = reinterpret_cast<float*>(angles + D / 2);
    const float* theta = static_cast<const float*>(p.theta) + block.head * (D / 2);
    if (threadIdx.x < D / 2) angles[threadIdx.x] = angle_of(theta[threadIdx.x]);
    __syncthreads();
    float* partial = static_cast<float*>(p.theta_partial) + (static_cast<int64_t>(block.tile) * p.heads + block.head) * (D / 2);
    const auto fold = [&](auto interleaved) {
      float share[D / 8];
      turn_back<D, interleaved>(grad_q[1], share, lines + kRows * D, angles);
      sum_theta_shares<D, interleaved>(partial, share, warp_sums, scale);
    };
    if (p.theta_interleaved) {
      fold(std::true_type());
    } else {
      fold(std::false_type());
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) grad_q[0][i / 4][i % 4] += grad_q[1][i / 4][i % 4];
  }
#pragma unroll
  for (int m = 0; m < kGrads; ++m) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) grad_q[m][i / 4][i % 4] *= scale;
    const int row = mine.first + m * kRows;
    write_rows<D>(static_cast<T*>(p.grad_q) + block.at(p, row) * D, stride, rows - row, grad_q[m], lines);
  }
}

}  // namespace

cudaError_t backward_rows(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>(query_blocks(params) * params.heads));
    return params.streams == 2
               ? launch(backward_rows_kernel<T, dim, 2>, grid, kThreads, backward_rows_shared<dim, 2>(), stream, params)
               : launch(backward_rows_kernel<T, dim, 1>, grid, kThreads, backward_rows_shared<dim, 1>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
