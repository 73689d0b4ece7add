#include "../../common/launch.cuh"
#include "../launch.h"
#include "rows.cuh"

namespace coda::kernels {
namespace {

template <class T>
__global__ void __launch_bounds__(8 * kWarp) forward_kernel(DiffAttentionForward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), kv_head = blockIdx.y;
  const int warp_rows = rows_per_warp(p.streams), block_rows = warp_rows * warp_count();
  A* tile = reinterpret_cast<A*>(shared);
  A* lines = tile + kTile * stride + warp_id() * kLines * stride;

  const int64_t group = p.heads / p.kv_heads;
  const auto where = find_tile(p.sequences, blockIdx.x, block_rows, [&](int64_t n) { return query_offset(p, n) * group; });
  const Sequence sequence(p, where.sequence, kv_head);
  if (where.begin >= sequence.rows) return;
  const int64_t row0 = where.begin + warp_id() * warp_rows;

  int64_t visible[kLines];
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const int64_t row = row0 + l % warp_rows;
    visible[l] = sequence.visible(row);
    const bool real = row < sequence.rows;
    load_row(lines + l * stride, real ? static_cast<const T*>(p.q) + sequence.at(row, p.heads) * dim : nullptr, dim);
    if (real && l >= warp_rows) {
      const A* theta = static_cast<const A*>(p.theta) + sequence.head(row) * (dim / 2);
      turn_query(lines + l * stride, dim, QueryTurn<A>{nullptr, false, theta, p.theta_interleaved});
    }
  }
  const int64_t last = min(where.begin + block_rows, sequence.rows) - 1;
  const int64_t keys = sequence.visible(last);
  RowState<A> state;
  for (int64_t key = 0; key < keys; key += kTile) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kTile), keys - key));
    const auto row_of = [&](const void* x) {
      return [=](int j) {
        return static_cast<const T*>(x) + ((sequence.key0 + key + j) * p.kv_heads + kv_head) * static_cast<int64_t>(dim);
      };
    };
    attend_tile(
        state, lines, tile, count, dim, [&] { load_tile(tile, count, dim, row_of(p.k)); },
        [&] { load_tile(tile, count, dim, row_of(p.v)); },
        [&](int l, A dot) { return key + lane_id() < visible[l] ? dot * static_cast<A>(p.scale) : neg_inf<A>(); });
  }
  const RowOutputs<T> to{static_cast<T*>(p.y),           static_cast<T*>(p.o2),        static_cast<T*>(p.diff),
                         static_cast<A*>(p.lse),         static_cast<const A*>(p.lam), static_cast<const A*>(p.norm_weight),
                         static_cast<A>(p.norm_eps)};
  finish_rows(to, state, p.streams, dim, p.queries * p.heads,
              [&](int r) { return row0 + r < sequence.rows ? sequence.at(row0 + r, p.heads) : int64_t{-1}; });
}

}  // namespace

cudaError_t portable::diff_attention_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const size_t tile = row_bytes<A>(params.dim, kTile), warp = row_bytes<A>(params.dim, kLines);
    const int warps = fit_warps(tile, warp);
    const int64_t blocks = row_blocks(params, warps * rows_per_warp(params.streams));
    const dim3 grid(static_cast<unsigned>(params.queries ? blocks : 0), params.kv_heads);
    return launch(forward_kernel<T>, grid, warps * kWarp, tile + warps * warp, stream, params);
  });
}

}  // namespace coda::kernels
