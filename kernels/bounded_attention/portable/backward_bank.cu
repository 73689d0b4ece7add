#include "../../common/attention_keys.cuh"
#include "../../common/launch.cuh"
#include "backward.h"
#include "../chunk_view.cuh"

namespace coda::kernels::portable {
namespace {

// Shared memory of a block whose warps own kKeys slots each.
template <class A>
struct Workspace {
  A *queries, *grads, *key_lines, *value_lines;
  Angle<A>* angles;

  __device__ Workspace(unsigned char* shared, int dim) {
    const int stride = row_stride<A>(dim);
    queries = reinterpret_cast<A*>(shared);
    grads = queries + kTile * stride;
    key_lines = grads + kTile * stride + warp_id() * 2 * kKeys * stride;
    value_lines = key_lines + kKeys * stride;
    angles = reinterpret_cast<Angle<A>*>(grads + (kTile + warp_count() * 2 * kKeys) * stride);
  }
};

template <class A>
size_t fixed_bytes(int dim) {
  return row_bytes<A>(dim, 2 * kTile) + dim * sizeof(A);
}

template <class A>
int key_warps(int dim) {
  return fit_warps(fixed_bytes<A>(dim), row_bytes<A>(dim, 2 * kKeys));
}

template <class A>
size_t shared_bytes(int dim) {
  return fixed_bytes<A>(dim) + row_bytes<A>(dim, key_warps<A>(dim) * 2 * kKeys);
}

// One chunk's queries against the slots in the block's lines. bias[l] is -inf for a slot to skip.
template <class T>
__device__ inline void gather_chunk(KeyState<acc_t<T>>& state, const Workspace<acc_t<T>>& work, const ChunkView<T>& chunk,
                                    const BoundedBackward& p, const acc_t<T> (&bias)[kKeys]) {
  using A = acc_t<T>;
  const int dim = p.dim, stride = row_stride<A>(dim);
  const int64_t size = p.tokens * p.heads;
  const A scale = static_cast<A>(p.scale);
  __syncthreads();
  chunk.bank_angles(work.angles);
  for (int row0 = 0; row0 < chunk.rows(); row0 += kTile) {
    const int count = min(kTile, chunk.rows() - row0);
    const bool real = lane_id() < count;
    const int64_t at = real ? chunk.at(row0 + lane_id()) : 0;
    A dp[kKeys];
    for (int stream = 0; stream < p.streams; ++stream) {
      __syncthreads();
      for (int j = warp_id(); j < count; j += warp_count()) {
        const int64_t from = chunk.at(row0 + j) * dim;
        load_row(work.queries + j * stride, static_cast<const T*>(p.q) + from, dim);
        turn_query(work.queries + j * stride, dim, chunk.turn(row0 + j, stream, work.angles));
        if (stream == 0) load_row(work.grads + j * stride, static_cast<const T*>(p.grad_diff) + from, dim);
      }
      __syncthreads();
      if (stream == 0) dot_lines(dp, work.value_lines, work.grads + lane_id() * stride, dim);
      const A lse = real ? static_cast<const A*>(p.lse)[stream * size + at] : A(0);
      const A delta = real ? static_cast<const A*>(p.delta)[stream * size + at] : A(0);
      const A factor = real ? (stream ? -static_cast<const A*>(p.lam)[at] : A(1)) : A(0);
      gather_tile(state, work.key_lines, work.queries, work.grads, dp, count, dim, lse, delta, factor, scale,
                  [&](int l, A dot) { return dot * scale + bias[l]; });
    }
  }
}

// A block owns kKeys exact slots per warp and walks the chunks of its sequence; a slot's gradient leaves the registers when its
// occupant changes.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) exact_slots_kernel(BoundedBackward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), block_slots = kKeys * warp_count();
  const Workspace<A> work(shared, dim);
  const int tiles = (p.exact_slots + block_slots - 1) / block_slots;
  const SequenceView<T> sequence(p, blockIdx.x / tiles, blockIdx.y);
  const int slot0 = static_cast<int>(blockIdx.x % tiles) * block_slots + warp_id() * kKeys;
  const int held = sequence.held();
  KeyState<A> state;
  int occupant[kKeys];
#pragma unroll
  for (int l = 0; l < kKeys; ++l) occupant[l] = -1;

  const auto leave = [&](int l) {
    if (occupant[l] < 0) return;
    const bool carried = occupant[l] < held;
    const int64_t row = carried ? sequence.state_row(occupant[l]) : sequence.token_row(occupant[l] - held);
    A* grad_k = static_cast<A*>(carried ? p.state_bank_grad_k : p.bank_grad_k) + row * dim;
    A* grad_v = static_cast<A*>(carried ? p.state_bank_grad_v : p.bank_grad_v) + row * dim;
    for_elements(dim, [&](int i, int d) {
      grad_k[d] += state.grad_k[l][i];
      grad_v[d] += state.grad_v[l][i];
    });
    const A grad_bias = warp_sum(state.grad_bias[l]);
    if (lane_id() == 0 && p.gate_bias && slot0 + l >= p.num_sinks) {
      A* gate = static_cast<A*>(carried ? p.state_gate_partial : p.gate_partial);
      gate[row] += grad_bias * sigmoid(-sequence.gate(occupant[l]));
    }
    state.clear(l);
  };
  for (int64_t i = 0; i < sequence.span.chunks; ++i) {
    const ChunkView<T> chunk(sequence, i);
    A bias[kKeys];
    bool any = false;
    __syncwarp();  // lanes may still be reading the lines for the chunk before
#pragma unroll
    for (int l = 0; l < kKeys; ++l) {
      const int slot = slot0 + l;
      const int now = slot < p.exact_slots ? chunk.source(slot) : -1;
      if (now != occupant[l]) {
        leave(l);
        occupant[l] = now;
        load_row(work.key_lines + l * stride, now < 0 ? nullptr : chunk.bank_key(now), dim);
        load_row(work.value_lines + l * stride, now < 0 ? nullptr : chunk.value(now), dim);
      }
      bias[l] = now < 0 ? neg_inf<A>() : chunk.exact_bias(slot);
      any |= now >= 0;
    }
    if (__syncthreads_or(any)) gather_chunk(state, work, chunk, p, bias);
  }
#pragma unroll
  for (int l = 0; l < kKeys; ++l) leave(l);
}

// Summary slots differ from chunk to chunk: a block owns kKeys slots per warp of one snapshot.
template <class T>
__global__ void __launch_bounds__(8 * kWarp) summary_slots_kernel(BoundedBackward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int dim = p.dim, stride = row_stride<A>(dim), block_slots = kKeys * warp_count();
  const Workspace<A> work(shared, dim);
  const int tiles = (p.summary_slots + block_slots - 1) / block_slots;
  const int64_t snapshot = blockIdx.x / tiles;
  const SequenceView<T> sequence(p, sequence_of_row(p, snapshot), blockIdx.y);
  if (snapshot >= sequence.span.row0 + sequence.span.chunks) return;
  const ChunkView<T> chunk(sequence, snapshot - sequence.span.row0);
  const int slot0 = static_cast<int>(blockIdx.x % tiles) * block_slots + warp_id() * kKeys;
  KeyState<A> state;
  A bias[kKeys];
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    const bool used = slot0 + l < p.summary_slots && chunk.mass(slot0 + l) > A(0);
    bias[l] = used ? chunk.summary_bias(slot0 + l) : neg_inf<A>();
    const int64_t row = used ? chunk.summary_row(slot0 + l) * dim : 0;
    load_row(work.key_lines + l * stride, used ? static_cast<const A*>(p.summary_k) + row : nullptr, dim);
    load_row(work.value_lines + l * stride, used ? static_cast<const A*>(p.summary_v) + row : nullptr, dim);
  }
  gather_chunk(state, work, chunk, p, bias);
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    if (bias[l] == neg_inf<A>()) continue;
    const int64_t row = chunk.summary_row(slot0 + l);
    for_elements(dim, [&](int i, int d) {
      static_cast<A*>(p.grad_summary_k)[row * dim + d] = state.grad_k[l][i];
      static_cast<A*>(p.grad_summary_v)[row * dim + d] = state.grad_v[l][i];
    });
    const A grad_bias = warp_sum(state.grad_bias[l]);
    if (lane_id() == 0 && p.mass_bias) static_cast<A*>(p.mass_partial)[row] = grad_bias / chunk.mass(slot0 + l);
  }
}

}  // namespace

cudaError_t bounded_backward_bank(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int warps = key_warps<A>(params.dim), slots = warps * kKeys;
    const size_t bytes = shared_bytes<A>(params.dim);
    const int64_t exact = params.sequences * ((params.exact_slots + slots - 1) / slots);
    const auto status = launch(exact_slots_kernel<T>, dim3(static_cast<unsigned>(exact), params.kv_heads), warps * kWarp, bytes,
                               stream, params);
    if (status != cudaSuccess) return status;
    const int64_t summary = params.chunk_rows * ((params.summary_slots + slots - 1) / slots);
    return launch(summary_slots_kernel<T>, dim3(static_cast<unsigned>(summary), params.kv_heads), warps * kWarp, bytes, stream,
                  params);
  });
}

}  // namespace coda::kernels::portable
