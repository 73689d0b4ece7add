#include "../../common/attention_rows.cuh"
#include "../../common/launch.cuh"
#include "../chunk_view.cuh"
#include "../launch.h"

namespace coda::kernels {
namespace {

template <class T>
__global__ void __launch_bounds__(8 * kWarp) forward_kernel(BoundedAttentionForward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim);
  const int warp_rows = rows_per_warp(p.streams), block_rows = warp_rows * warp_count();
  A* tile = reinterpret_cast<A*>(shared);
  A* lines = tile + kTile * stride + warp_id() * kLines * stride;
  auto* angles = reinterpret_cast<Angle<A>*>(tile + (kTile + warp_count() * kLines) * stride);

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
  RowState<A> state;
  const A scale = static_cast<A>(p.scale);
  chunk.bank_angles(angles);
  load_lines(true);
  for_bank_tiles(chunk, [&](int count, auto keys, auto values, A bias) {
    attend_tile(
        state, lines, tile, count, dim, [&] { load_tile(tile, count, dim, keys); }, [&] { load_tile(tile, count, dim, values); },
        [&](int l, A dot) { return row0 + l % warp_rows < chunk.rows() ? dot * scale + bias : neg_inf<A>(); });
  });
  __syncwarp();
  if (p.has_bank_distance) load_lines(false);
  const int64_t last = chunk.position(min(block_row0 + block_rows, chunk.rows()) - 1);
  for_window_tiles(chunk, last, [&](int count, auto keys, auto values, int64_t position) {
    attend_tile(
        state, lines, tile, count, dim, [&] { load_tile(tile, count, dim, keys); }, [&] { load_tile(tile, count, dim, values); },
        [&](int l, A dot) {
          const int row = row0 + l % warp_rows;
          return row < chunk.rows() && position + lane_id() <= chunk.position(row) ? dot * scale : neg_inf<A>();
        });
  });
  const RowOutputs<T> to{static_cast<T*>(p.y),           static_cast<T*>(p.o2),        static_cast<T*>(p.diff),
                         static_cast<A*>(p.lse),         static_cast<const A*>(p.lam), static_cast<const A*>(p.norm_weight),
                         static_cast<A>(p.norm_eps)};
  finish_rows(to, state, p.streams, dim, p.tokens * p.heads,
              [&](int r) { return row0 + r < chunk.rows() ? chunk.at(row0 + r) : int64_t{-1}; });
}

}  // namespace

cudaError_t portable::bounded_attention_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const size_t fixed = row_bytes<A>(params.dim, kTile) + params.dim * sizeof(A), warp = row_bytes<A>(params.dim, kLines);
    const int warps = fit_warps(fixed, warp);
    const int64_t blocks = params.chunk_rows * tiles_per_chunk(params, warps * rows_per_warp(params.streams));
    return launch(forward_kernel<T>, dim3(static_cast<unsigned>(blocks), params.kv_heads), warps * kWarp, fixed + warps * warp,
                  stream, params);
  });
}

}  // namespace coda::kernels
