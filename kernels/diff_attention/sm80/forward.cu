#include "../launch.h"
#include "tiles.cuh"

namespace coda::kernels::sm80 {
namespace {

// Keys of a tile. Tiles of 8 KiB leave room for two blocks where a multiprocessor has 100 KiB of shared memory.
constexpr int forward_keys(int dim) { return 4096 / dim; }

template <int D>
constexpr size_t forward_shared() {
  return sizeof(uint16_t) * D * (2 * kRows + 2 * forward_keys(D));
}

// The online softmax of 16 rows: turns scaled logits into weights relative to the new peaks. total is of this lane's columns
// only.
template <int N, int M>
__device__ inline void absorb_logits(float (&s)[N][4], float (&out)[M][4], float (&peak)[2], float (&total)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = peak[r];
#pragma unroll
    for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = quad_max(top);
    const float base = top == neg_inf<float>() ? 0.0f : top;
    const float shrink = exp2_approximate(peak[r] - base);
    peak[r] = top;
    total[r] *= shrink;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[n][2 * r + c] = exp2_approximate(s[n][2 * r + c] - base);
        total[r] += s[n][2 * r + c];
      }
    }
#pragma unroll
    for (int n = 0; n < M; ++n) {
      out[n][2 * r] *= shrink;
      out[n][2 * r + 1] *= shrink;
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(DiffAttentionForward p) {
  constexpr int kKeys = forward_keys(D);
  extern __shared__ __align__(128) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  T* keys = queries + 2 * kRows * D;
  T* values = keys + kKeys * D;

  const QueryBlock block(p, query_block_rows(p.streams));
  if (block.rows <= 0) return;
  const int row0 = block.row0, rows = block.rows, seen = block.seen;
  const int64_t q_stride = p.q_strides.token, k_stride = p.k_strides.token, v_stride = p.v_strides.token;
  const T* q = block.sequence.q<T>(p, block.head) + row0 * q_stride;
  const T* k = block.sequence.k<T>(p, block.kv_head);
  const T* v = block.sequence.v<T>(p, block.kv_head);
  load_tile<D, kRows>(queries, q, q_stride, rows);
  if (p.streams == 1) load_tile<D, kRows>(queries + kRows * D, q + kRows * q_stride, q_stride, rows - kRows);
  load_tile<D, kKeys>(keys, k, k_stride, seen);
  commit_copies();

  const LaneRows mine(block, p.streams);
  if (p.streams == 2) {
    wait_copies<0>();
    __syncthreads();
    turn_tile<D>(queries + kRows * D, queries, static_cast<const float*>(p.theta) + block.head * (D / 2), p.theta_interleaved);
  }

  const float scale = static_cast<float>(p.scale) * kLog2E;
  float out[2][D / 8][4] = {}, total[2][2] = {};
  float peak[2][2] = {{neg_inf<float>(), neg_inf<float>()}, {neg_inf<float>(), neg_inf<float>()}};
  T* lines = queries + mine.first * D;
  for (int key = 0; key < seen; key += kKeys) {
    wait_copies<0>();
    __syncthreads();
    load_tile<D, kKeys>(values, v + key * v_stride, v_stride, seen - key);
    commit_copies();
    float s[2][kKeys / 8][4] = {};
    multiply_rows<D>(s, lines, kRows * D, keys);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[m][i / 4][i % 4] *= scale;
    }
    mine.hide(s, key, neg_inf<float>());
#pragma unroll
    for (int m = 0; m < 2; ++m) absorb_logits(s[m], out[m], peak[m], total[m]);
    wait_copies<0>();
    __syncthreads();
    if (key + kKeys < seen) load_tile<D, kKeys>(keys, k + (key + kKeys) * k_stride, k_stride, seen - key - kKeys);
    commit_copies();
    multiply_columns<D>(out, s, values);
  }
  // Copies of a block that sees no key may still be under way, and its queries are what the stores below go through.
  wait_copies<0>();
  __syncthreads();

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(total[m][r]), inverse = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[m][n][2 * r] *= inverse;
        out[m][n][2 * r + 1] *= inverse;
      }
      const int row = mine.row(m, r);
      if (p.lse && row < rows && lane_id() % 4 == 0) {
        const int64_t stream = p.streams == 2 ? m * p.queries * p.heads : 0;
        static_cast<float*>(p.lse)[stream + block.at(p, row)] = sum > 0.0f ? peak[m][r] * kLn2 + logf(sum) : neg_inf<float>();
      }
    }
  }

  const auto store = [&](void* to, const float(&x)[D / 8][4], int row) {
    write_rows<D>(static_cast<T*>(to) + block.at(p, row) * D, static_cast<int64_t>(p.heads) * D, rows - row, x, lines);
  };
  const auto finish = [&](float(&x)[D / 8][4], int row) {
    if (p.diff) store(p.diff, x, row);
    if (p.norm_weight) {
      const float* weight = static_cast<const float*>(p.norm_weight) + lane_id() % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float square = 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) square += x[n][2 * r] * x[n][2 * r] + x[n][2 * r + 1] * x[n][2 * r + 1];
        const float rstd = rsqrtf(quad_sum(square) / D + static_cast<float>(p.norm_eps));
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          x[n][2 * r] *= rstd * weight[8 * n];
          x[n][2 * r + 1] *= rstd * weight[8 * n + 1];
        }
      }
    }
    store(p.y, x, row);
  };
  if (p.streams == 2) {
    if (p.o2) store(p.o2, out[1], mine.first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float lam = mine.row(0, r) < rows ? static_cast<const float*>(p.lam)[block.at(p, mine.row(0, r))] : 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[0][n][2 * r] -= lam * out[1][n][2 * r];
        out[0][n][2 * r + 1] -= lam * out[1][n][2 * r + 1];
      }
    }
  } else {
    finish(out[1], mine.first + kRows);
  }
  finish(out[0], mine.first);
}

}  // namespace

cudaError_t diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    const dim3 grid(static_cast<unsigned>(query_blocks(params) * params.heads));
    return launch(forward_kernel<decltype(zero), dim>, grid, kThreads, forward_shared<dim>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
