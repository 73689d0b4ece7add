#include "../../common/attention_rows.cuh"
#include "../../common/launch.cuh"
#include "backward.h"
#include "../chunk_view.cuh"

namespace coda::kernels::portable {
namespace {

// grad_q and the shares of grad_theta.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) backward_rows_kernel(BoundedBackward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim);
  const int warp_rows = rows_per_warp(p.streams), block_rows = warp_rows * warp_count();
  A* tile = reinterpret_cast<A*>(shared);
  A* all_lines = tile + kTile * stride;
  A* lines = all_lines + warp_id() * 2 * kLines * stride;
  A* grads = lines + kLines * stride;
  auto* angles = reinterpret_cast<Angle<A>*>(all_lines + warp_count() * 2 * kLines * stride);

  const int64_t tiles = tiles_per_chunk(p, block_rows);
  const int64_t snapshot = blockIdx.x / tiles;
  const SequenceView<T> sequence(p, sequence_of_row(p, snapshot), blockIdx.y);
  if (snapshot >= sequence.span.row0 + sequence.span.chunks) return;
  const ChunkView<T> chunk(sequence, snapshot - sequence.span.row0);
  const int block_row0 = static_cast<int>(blockIdx.x % tiles) * block_rows;
  if (block_row0 >= chunk.rows()) return;
  const int row0 = block_row0 + warp_id() * warp_rows;

  const auto load_lines = [&](bool bank) {
    for (int l = 0; l < kLines; ++l) {
      const int row = row0 + l % warp_rows;
      const bool real = row < chunk.rows();
      load_row(lines + l * stride, real ? static_cast<const T*>(p.q) + chunk.at(row) * dim : nullptr, dim);
      auto turn = chunk.turn(row, l / warp_rows, angles);
      if (!bank) turn.bank = nullptr;
      turn_query(lines + l * stride, dim, turn);
    }
    __syncwarp();
  };
  for (int r = 0; r < warp_rows; ++r) {
    const bool real = row0 + r < chunk.rows();
    load_row(grads + r * stride, real ? static_cast<const T*>(p.grad_diff) + chunk.at(row0 + r) * dim : nullptr, dim);
  }
  LineGradient<A> mine{A(0), A(0), A(0)};
  if (lane_id() < kLines && row0 + lane_id() % warp_rows < chunk.rows()) {
    const int64_t at = chunk.at(row0 + lane_id() % warp_rows), size = p.tokens * p.heads;
    const int stream = lane_id() / warp_rows;
    mine.lse = static_cast<const A*>(p.lse)[stream * size + at];
    mine.delta = static_cast<const A*>(p.delta)[stream * size + at];
    mine.factor = stream ? -static_cast<const A*>(p.lam)[at] : A(1);
  }
  A grad_q[kLines][kVec] = {};
  const A scale = static_cast<A>(p.scale);
  // Ends a span of keys: see fold_streams. Both spans' shares of theta go to the same place, one after the other.
  const auto fold = [&](bool bank) {
    fold_streams(grad_q, lines, p.streams, dim, [&](int r) {
      auto turn = chunk.turn(row0 + r, p.streams - 1, angles);
      if (!bank) turn.bank = nullptr;
      return turn;
    });
    if (p.streams == 1) return;
    __syncthreads();
    sum_theta_shares(static_cast<A*>(p.theta_partial) + static_cast<int64_t>(blockIdx.x) * p.heads * (dim / 2), all_lines,
                     2 * kLines * stride, int64_t{block_row0},
                     static_cast<int64_t>(min(block_rows, chunk.rows() - block_row0)), sequence.group, chunk.head(0), dim,
                     p.theta_interleaved);
    __syncthreads();
  };
  chunk.bank_angles(angles);
  load_lines(true);
  for_bank_tiles(chunk, [&](int count, auto keys, auto values, A bias) {
    backward_tile(
        grad_q, lines, grads, mine, p.streams, tile, count, dim, scale, [&] { load_tile(tile, count, dim, keys); },
        [&] { load_tile(tile, count, dim, values); },
        [&](int l, A dot) { return row0 + l % warp_rows < chunk.rows() ? dot * scale + bias : neg_inf<A>(); });
  });
  if (p.has_bank_distance) {
    fold(true);
    load_lines(false);
  }
  const int64_t last = chunk.position(min(block_row0 + block_rows, chunk.rows()) - 1);
  for_window_tiles(chunk, last, [&](int count, auto keys, auto values, int64_t position) {
    backward_tile(
        grad_q, lines, grads, mine, p.streams, tile, count, dim, scale, [&] { load_tile(tile, count, dim, keys); },
        [&] { load_tile(tile, count, dim, values); },
        [&](int l, A dot) {
          const int row = row0 + l % warp_rows;
          return row < chunk.rows() && position + lane_id() <= chunk.position(row) ? dot * scale : neg_inf<A>();
        });
  });
  fold(false);
#pragma unroll
  for (int r = 0; r < kLines; ++r) {
    if (r >= warp_rows || row0 + r >= chunk.rows()) break;
    const int64_t at = chunk.at(row0 + r) * dim;
    for_elements(dim, [&](int i, int d) { static_cast<T*>(p.grad_q)[at + d] = narrow<T>(grad_q[r][i]); });
  }
}

template <class A>
size_t fixed_bytes(int dim) {
  return row_bytes<A>(dim, kTile) + dim * sizeof(A);
}

template <class A>
int row_warps(int dim) {
  return fit_warps(fixed_bytes<A>(dim), row_bytes<A>(dim, 2 * kLines));
}

}  // namespace

int64_t bounded_backward_row_blocks(const BoundedAttentionParams& params, DType dtype) {
  const int warps = dtype == DType::kFloat64 ? row_warps<double>(params.dim) : row_warps<float>(params.dim);
  return params.chunk_rows * tiles_per_chunk(params, warps * rows_per_warp(params.streams));
}

cudaError_t bounded_backward_rows(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int warps = row_warps<A>(params.dim);
    const int64_t blocks = bounded_backward_row_blocks(params, dtype);
    return launch(backward_rows_kernel<T>, dim3(static_cast<unsigned>(blocks), params.kv_heads), warps * kWarp,
                  fixed_bytes<A>(params.dim) + row_bytes<A>(params.dim, warps * 2 * kLines), stream, params);
  });
}

}  // namespace coda::kernels::portable
