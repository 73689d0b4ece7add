#include "../../common/attention_keys.cuh"
#include "../../common/launch.cuh"
#include "../launch.h"
#include "rows.cuh"

namespace coda::kernels {
namespace {

// grad_q and the shares of grad_theta.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) backward_rows_kernel(DiffAttentionBackward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), kv_head = blockIdx.y;
  const int warp_rows = rows_per_warp(p.streams), block_rows = warp_rows * warp_count();
  A* tile = reinterpret_cast<A*>(shared);
  A* all_lines = tile + kTile * stride;
  A* lines = all_lines + warp_id() * 2 * kLines * stride;
  A* grads = lines + kLines * stride;

  const int64_t group = p.heads / p.kv_heads;
  const auto where = find_tile(p.sequences, blockIdx.x, block_rows, [&](int64_t n) { return query_offset(p, n) * group; });
  const Sequence sequence(p, where.sequence, kv_head);
  if (where.begin >= sequence.rows) return;
  const int64_t row0 = where.begin + warp_id() * warp_rows;

  const auto turn_of = [&](int r) {
    const int64_t row = min(row0 + r, sequence.rows - 1);
    return QueryTurn<A>{nullptr, false, static_cast<const A*>(p.theta) + sequence.head(row) * (dim / 2), p.theta_interleaved};
  };
  int64_t visible[kLines];
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const int64_t row = row0 + l % warp_rows;
    visible[l] = sequence.visible(row);
    const bool real = row < sequence.rows;
    const int64_t at = real ? sequence.at(row, p.heads) : 0;
    load_row(lines + l * stride, real ? static_cast<const T*>(p.q) + at * dim : nullptr, dim);
    if (l >= warp_rows) {
      turn_query(lines + l * stride, dim, turn_of(l % warp_rows));
    } else {
      load_row(grads + l * stride, real ? static_cast<const T*>(p.grad_diff) + at * dim : nullptr, dim);
    }
  }
  LineGradient<A> mine{A(0), A(0), A(0)};
  if (lane_id() < kLines && row0 + lane_id() % warp_rows < sequence.rows) {
    const int64_t at = sequence.at(row0 + lane_id() % warp_rows, p.heads);
    const int stream = lane_id() / warp_rows;
    const int64_t size = p.queries * p.heads;
    mine.lse = static_cast<const A*>(p.lse)[stream * size + at];
    mine.delta = static_cast<const A*>(p.delta)[stream * size + at];
    mine.factor = stream ? -static_cast<const A*>(p.lam)[at] : A(1);
  }
  __syncwarp();
  A grad_q[kLines][kVec] = {};
  const int64_t last = min(where.begin + block_rows, sequence.rows) - 1;
  const int64_t keys = sequence.visible(last);
  for (int64_t key = 0; key < keys; key += kTile) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kTile), keys - key));
    const auto row_of = [&](const void* x) {
      return [=](int j) {
        return static_cast<const T*>(x) + ((sequence.key0 + key + j) * p.kv_heads + kv_head) * static_cast<int64_t>(dim);
      };
    };
    backward_tile(
        grad_q, lines, grads, mine, p.streams, tile, count, dim, static_cast<A>(p.scale),
        [&] { load_tile(tile, count, dim, row_of(p.k)); }, [&] { load_tile(tile, count, dim, row_of(p.v)); },
        [&](int l, A dot) { return key + lane_id() < visible[l] ? dot * static_cast<A>(p.scale) : neg_inf<A>(); });
  }
  fold_streams(grad_q, lines, p.streams, dim, turn_of);
#pragma unroll
  for (int r = 0; r < kLines; ++r) {
    if (r >= warp_rows || row0 + r >= sequence.rows) break;
    const int64_t at = sequence.at(row0 + r, p.heads) * dim;
    for_elements(dim, [&](int i, int d) { static_cast<T*>(p.grad_q)[at + d] = narrow<T>(grad_q[r][i]); });
  }
  if (p.streams == 1) return;
  __syncthreads();
  sum_theta_shares(static_cast<A*>(p.theta_partial) + static_cast<int64_t>(blockIdx.x) * p.heads * (dim / 2), all_lines,
                   2 * kLines * stride, where.begin, min(static_cast<int64_t>(block_rows), sequence.rows - where.begin),
                   sequence.group, sequence.head0, dim, p.theta_interleaved);
}

// grad_k and grad_v: a block owns kKeys keys per warp and walks the query rows that see them.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) backward_keys_kernel(DiffAttentionBackward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), kv_head = blockIdx.y;
  const int block_keys = kKeys * warp_count();
  A* queries = reinterpret_cast<A*>(shared);
  A* grads = queries + kTile * stride;
  A* key_lines = grads + kTile * stride + warp_id() * 2 * kKeys * stride;
  A* value_lines = key_lines + kKeys * stride;

  const auto where = find_tile(p.sequences, blockIdx.x, block_keys, [&](int64_t n) { return key_offset(p, n); });
  const Sequence sequence(p, where.sequence, kv_head);
  if (where.begin >= sequence.keys) return;
  const int64_t key0 = where.begin + warp_id() * kKeys;
  const auto at_key = [&](int64_t key) { return ((sequence.key0 + key) * p.kv_heads + kv_head) * dim; };
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    const bool real = key0 + l < sequence.keys;
    load_row(key_lines + l * stride, real ? static_cast<const T*>(p.k) + at_key(key0 + l) : nullptr, dim);
    load_row(value_lines + l * stride, real ? static_cast<const T*>(p.v) + at_key(key0 + l) : nullptr, dim);
  }
  __syncwarp();
  KeyState<A> state;
  const int64_t first_token = p.causal ? max(int64_t{0}, where.begin - (sequence.keys - sequence.queries)) : 0;
  const int64_t size = p.queries * p.heads;
  for (int64_t row0 = first_token * sequence.group / kTile * kTile; row0 < sequence.rows; row0 += kTile) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kTile), sequence.rows - row0));
    const int64_t row = row0 + lane_id();
    const bool real = lane_id() < count;
    const int64_t visible = real ? sequence.visible(row) : 0;
    const int64_t at = real ? sequence.at(row, p.heads) : 0;
    A dp[kKeys];
    for (int stream = 0; stream < p.streams; ++stream) {
      __syncthreads();
      for (int j = warp_id(); j < count; j += warp_count()) {
        load_row(queries + j * stride, static_cast<const T*>(p.q) + sequence.at(row0 + j, p.heads) * dim, dim);
        if (stream) {
          const A* theta = static_cast<const A*>(p.theta) + sequence.head(row0 + j) * (dim / 2);
          turn_query(queries + j * stride, dim, QueryTurn<A>{nullptr, false, theta, p.theta_interleaved});
        } else {
          load_row(grads + j * stride, static_cast<const T*>(p.grad_diff) + sequence.at(row0 + j, p.heads) * dim, dim);
        }
      }
      __syncthreads();
      if (stream == 0) dot_lines(dp, value_lines, grads + lane_id() * stride, dim);
      const A lse = real ? static_cast<const A*>(p.lse)[stream * size + at] : A(0);
      const A delta = real ? static_cast<const A*>(p.delta)[stream * size + at] : A(0);
      const A factor = real ? (stream ? -static_cast<const A*>(p.lam)[at] : A(1)) : A(0);
      gather_tile(state, key_lines, queries, grads, dp, count, dim, lse, delta, factor, static_cast<A>(p.scale),
                  [&](int l, A dot) { return key0 + l < visible ? dot * static_cast<A>(p.scale) : neg_inf<A>(); });
    }
  }
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    if (key0 + l >= sequence.keys) break;
    for_elements(dim, [&](int i, int d) {
      static_cast<T*>(p.grad_k)[at_key(key0 + l) + d] = narrow<T>(state.grad_k[l][i]);
      static_cast<T*>(p.grad_v)[at_key(key0 + l) + d] = narrow<T>(state.grad_v[l][i]);
    });
  }
}

template <class A>
int row_warps(int dim) {
  return fit_warps(row_bytes<A>(dim, kTile), row_bytes<A>(dim, 2 * kLines));
}

}  // namespace

BackwardNeeds portable::diff_attention_backward_needs(const DiffAttentionParams& params, DType dtype) {
  const int warps = dtype == DType::kFloat64 ? row_warps<double>(params.dim) : row_warps<float>(params.dim);
  return {row_blocks(params, warps * rows_per_warp(params.streams)), 0};
}

cudaError_t portable::diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int dim = params.dim;
    int warps = row_warps<A>(dim);
    const int64_t rows = diff_attention_backward_needs(params, dtype).theta_shares;
    const auto status = launch(backward_rows_kernel<T>, dim3(static_cast<unsigned>(params.queries ? rows : 0), params.kv_heads),
                               warps * kWarp, row_bytes<A>(dim, kTile + warps * 2 * kLines), stream, params);
    if (status != cudaSuccess) return status;
    warps = fit_warps(row_bytes<A>(dim, 2 * kTile), row_bytes<A>(dim, 2 * kKeys));
    const int64_t keys = tile_bound(params.keys, params.sequences, warps * kKeys);
    return launch(backward_keys_kernel<T>, dim3(static_cast<unsigned>(params.keys ? keys : 0), params.kv_heads), warps * kWarp,
                  row_bytes<A>(dim, 2 * kTile + warps * 2 * kKeys), stream, params);
  });
}

}  // namespace coda::kernels
