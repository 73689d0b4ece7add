#include "keys.cuh"

namespace coda::kernels::sm80 {
namespace {

// Gradients of every key and value of a sequence: those that the window's queries give, and those that the bank kernel left. The
// items of a sequence are the carried exact slots, then what the ring holds and the new tokens in the order of their positions.
template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 2) backward_window_kernel(const __grid_constant__ BoundedBackward p) {
  extern __shared__ __align__(256) unsigned char shared[];
  const KeysMemory<T, D, Streams> memory(shared);
  const int held = p.window + p.exact_slots;
  const auto where = find_tile(p.sequences, blockIdx.x / p.kv_heads, kKeys,
                               [&](int64_t n) { return p.cu_seqlens[n] + n * held; });
  const HeadView& view = block_view(p, where.sequence, blockIdx.x % p.kv_heads);
  const int item0 = static_cast<int>(where.begin), count = held + view.length - item0;
  if (count <= 0) return;
  const int token0 = item0 - held;  // of the block's first item, were it no exact slot

  // Tokens of the ring and new ones among them: [token_begin, token_end), where not empty.
  const int oldest = -static_cast<int>(min(view.first, static_cast<int64_t>(p.window)));
  const int token_begin = max(token0, oldest), token_end = token0 + min(kKeys, count);
  // Rows that see a token: from its own on, to the end of the last chunk whose window reaches it.
  const auto rows_begin = [&](int token) { return max(token, 0) * view.group; };
  const auto rows_end = [&](int token) {
    return min((view.lead + token + p.window) / p.chunk * p.chunk - view.lead, view.length) * view.group;
  };
  // Where an item's key, value and gradients are.
  const auto carried = [&](int item) { return token0 + item < 0; };
  const auto row_of = [&](int item) {
    const int token = token0 + item;
    if (token >= 0) return view.token_row(token);
    if (token < -p.window) return view.state_row(token + p.exact_slots + 2 * p.window);
    return view.state_row(static_cast<int>((view.first + token + p.window) % p.window));
  };
  const auto entry_of = [&](int item) {
    return p.exact_slots > 0 && item < count ? (carried(item) ? p.state_entry : p.entry)[row_of(item)] : 0;
  };

  const int first = 16 * warp_id();
  const int end = token_begin < token_end ? rows_end(token_end - 1) : 0;
  int row = token_begin < token_end ? rows_begin(token_begin) : 0;
  for_packets<D, kKeys>([&](int item, int packet) {
    const bool real = item < count && token0 + item >= oldest;
    const int64_t at = real ? row_of(item) * D + packet * 8 : 0;
    T* to = reinterpret_cast<T*>(shared) + place<D>(item, packet);
    copy_packet(to, static_cast<const T*>(real && carried(item) ? p.state_k : p.k) + at, real);
    copy_packet(to + kKeys * D, static_cast<const T*>(real && carried(item) ? p.state_v : p.v) + at, real);
  });
  RowWalk<D> walk;
  walk.seek(view, row);
  if (row < end) memory.load_step(p, view, p.q, p.q2, walk, 0, row, end);
  commit_copies();

  int begin[2];
  unsigned span[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int item = first + lane_id() / 4 + 8 * r, token = token0 + item;
    const bool real = item < count && token >= oldest;
    begin[r] = real ? rows_begin(token) : 0;
    span[r] = real ? max(rows_end(token) - begin[r], 0) : 0;
  }
  // Whether any row of a step sees the lane's r-th key.
  const auto sees = [&](int r, int from) { return from + kStep > begin[r] && from < begin[r] + static_cast<int>(span[r]); };
  const float scale = static_cast<float>(p.scale), log2_scale = scale * kLog2E;
  KeyGradients<D> sum;
  sum.clear(0);
  sum.clear(1);
  for (int stage = 0; row < end; row += kStep, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();
    if (row + kStep < end) memory.load_step(p, view, p.q, p.q2, walk, stage ^ 1, row + kStep, end);
    commit_copies();
    const auto seen = [&](int at, int r) { return static_cast<unsigned>(row + at - begin[r]) < span[r]; };
    if (!__any_sync(kAllLanes, sees(0, row) || sees(1, row))) continue;
    gather_step(sum, memory, stage, log2_scale, [&](int at, int r) { return seen(at, r) ? 0.0f : neg_inf<float>(); });
  }
  wait_copies<0>();
  __syncthreads();

#pragma unroll
  for (int i = 0; i < D / 2; ++i) sum.k[0][i / 4][i % 4] *= scale;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int item = first + lane_id() / 4 + 8 * r;
    if (!entry_of(item)) continue;
    const int64_t at = row_of(item) * D + lane_id() % 4 * 2;
    const float* bank_k = (carried(item) ? p.state_bank_grad_k : p.bank_grad_k) + at;
    const float* bank_v = (carried(item) ? p.state_bank_grad_v : p.bank_grad_v) + at;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum.k[0][n][2 * r + c] += bank_k[8 * n + c];
        sum.v[0][n][2 * r + c] += bank_v[8 * n + c];
      }
    }
  }
  const auto store = [&](void* fresh, void* state, const float(&x)[D / 8][4]) {
    scatter_rows<D>(x, memory.keys, [&](int i) -> T* {
      const int item = first + i;
      return item < count ? static_cast<T*>(carried(item) ? state : fresh) + row_of(item) * D : nullptr;
    });
  };
  store(p.grad_k, p.grad_state_k, sum.k[0]);
  store(p.grad_v, p.grad_state_v, sum.v[0]);
}

}  // namespace

cudaError_t bounded_backward_window(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    const int64_t items = params.tokens + params.sequences * (params.window + params.exact_slots);
    const dim3 grid(static_cast<unsigned>(tile_bound(items, params.sequences, kKeys) * params.kv_heads));
    return params.streams == 2
               ? launch(backward_window_kernel<T, dim, 2>, grid, kThreads, keys_shared<dim, 2>(), stream, params)
               : launch(backward_window_kernel<T, dim, 1>, grid, kThreads, keys_shared<dim, 1>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
