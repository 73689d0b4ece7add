#include "../../common/attention_keys.cuh"
#include "../../common/launch.cuh"
#include "backward.h"
#include "../chunk_view.cuh"

namespace coda::kernels::portable {
namespace {

// Gradients of every key and value of a sequence: those that the window's queries give, gathered as in dense attention, and those
// that the bank kernel left, turned from position 0 to the key's own. A block owns kKeys flat sources per warp.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) window_kernel(BoundedBackward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), block_keys = kKeys * warp_count();
  A* queries = reinterpret_cast<A*>(shared);
  A* grads = queries + kTile * stride;
  A* key_lines = grads + kTile * stride + warp_id() * 2 * kKeys * stride;
  A* value_lines = key_lines + kKeys * stride;

  const int held = p.window + p.exact_slots;
  const auto where = find_tile(p.sequences, blockIdx.x, block_keys, [&](int64_t n) { return p.cu_seqlens[n] + n * held; });
  const SequenceView<T> sequence(p, where.sequence, blockIdx.y);
  const auto& span = sequence.span;
  const int64_t sources = held + span.length;
  if (where.begin >= sources) return;
  const int64_t source0 = where.begin + warp_id() * kKeys;

  // Position of a source that the window can see, else negative.
  const auto position_of = [&](int64_t source) -> int64_t {
    if (source >= sources) return -1;
    if (source >= held) return span.first + source - held;
    return source < p.window ? ring_position(span.first, static_cast<int>(source), p.window) : -1;
  };
  // New tokens [begin, end), as positions, among which are all that see the block's keys.
  int64_t begin = span.end(), end = span.first;
  if (lane_id() < block_keys) {
    const int64_t position = position_of(where.begin + lane_id());
    if (position >= 0) {
      begin = max(position, span.first);
      end = min(span.end(), ((position + p.window - p.chunk) / p.chunk + 1) * p.chunk);
    }
  }
  begin = warp_min(begin);
  end = warp_max(end);

  int64_t position[kKeys];
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    position[l] = position_of(source0 + l);
    const bool seen = position[l] >= 0;
    load_row(key_lines + l * stride, seen ? sequence.row(p.state_k, p.k, source0 + l) : nullptr, dim);
    load_row(value_lines + l * stride, seen ? sequence.value(source0 + l) : nullptr, dim);
  }
  __syncwarp();
  KeyState<A> state;
  const int64_t size = p.tokens * p.heads;
  const A scale = static_cast<A>(p.scale);
  const int64_t rows = (end - span.first) * sequence.group;
  for (int64_t row0 = (begin - span.first) * sequence.group / kTile * kTile; row0 < rows; row0 += kTile) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kTile), rows - row0));
    const bool real = lane_id() < count;
    const int64_t row = row0 + lane_id();
    const int64_t at = real ? sequence.at(0, row) : 0;
    const int64_t t = span.first + row / sequence.group;
    const int64_t window_begin = t / p.chunk * p.chunk - (p.window - p.chunk);
    A dp[kKeys];
    for (int stream = 0; stream < p.streams; ++stream) {
      __syncthreads();
      for (int j = warp_id(); j < count; j += warp_count()) {
        const int64_t from = sequence.at(0, row0 + j) * dim;
        load_row(queries + j * stride, static_cast<const T*>(p.q) + from, dim);
        if (stream) {
          const A* theta = static_cast<const A*>(p.theta) + sequence.head(row0 + j) * (dim / 2);
          turn_query(queries + j * stride, dim, QueryTurn<A>{nullptr, false, theta, p.theta_interleaved});
        } else {
          load_row(grads + j * stride, static_cast<const T*>(p.grad_diff) + from, dim);
        }
      }
      __syncthreads();
      if (stream == 0) dot_lines(dp, value_lines, grads + lane_id() * stride, dim);
      const A lse = real ? static_cast<const A*>(p.lse)[stream * size + at] : A(0);
      const A delta = real ? static_cast<const A*>(p.delta)[stream * size + at] : A(0);
      const A factor = real ? (stream ? -static_cast<const A*>(p.lam)[at] : A(1)) : A(0);
      gather_tile(state, key_lines, queries, grads, dp, count, dim, lse, delta, factor, scale, [&](int l, A dot) {
        return position[l] >= 0 && position[l] <= t && position[l] >= window_begin ? dot * scale : neg_inf<A>();
      });
    }
  }
  __syncwarp();
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    const int64_t source = source0 + l;
    if (source >= sources) break;
    const bool carried = source < held;
    const int64_t row = (carried ? sequence.state_row(static_cast<int>(source)) : sequence.token_row(source - held)) * dim;
    if (p.exact_slots > 0) {
      const A* bank_k = static_cast<const A*>(carried ? p.state_bank_grad_k : p.bank_grad_k) + row;
      const A* bank_v = static_cast<const A*>(carried ? p.state_bank_grad_v : p.bank_grad_v) + row;
      A* line = key_lines + l * stride;
      load_row(line, bank_k, dim);
      if (p.has_bank_distance && position[l] >= 0) {
        rotate_row(line, dim, p.rope_interleaved, [&](int i) { return rope_angle<A>(position[l], p.inv_freq[i]); });
      }
      __syncwarp();
      for_elements(dim, [&](int i, int d) {
        state.grad_k[l][i] += line[d];
        state.grad_v[l][i] += bank_v[d];
      });
    }
    T* grad_k = static_cast<T*>(carried ? p.grad_state_k : p.grad_k) + row;
    T* grad_v = static_cast<T*>(carried ? p.grad_state_v : p.grad_v) + row;
    for_elements(dim, [&](int i, int d) {
      grad_k[d] = narrow<T>(state.grad_k[l][i]);
      grad_v[d] = narrow<T>(state.grad_v[l][i]);
    });
  }
}

}  // namespace

cudaError_t bounded_backward_window(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int dim = params.dim, warps = fit_warps(row_bytes<A>(dim, 2 * kTile), row_bytes<A>(dim, 2 * kKeys));
    const int64_t sources = params.tokens + params.sequences * (params.window + params.exact_slots);
    const int64_t blocks = tile_bound(sources, params.sequences, warps * kKeys);
    return launch(window_kernel<T>, dim3(static_cast<unsigned>(blocks), params.kv_heads), warps * kWarp,
                  row_bytes<A>(dim, 2 * kTile + warps * 2 * kKeys), stream, params);
  });
}

}  // namespace coda::kernels::portable
