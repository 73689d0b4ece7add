#include "keys.cuh"

namespace coda::kernels::sm80 {
namespace {

// Tokens of the chunks that a block walks. Short, so that one long sequence fills the device; a source that stands in the bank over
// several segments gets as many sums, in any order.
constexpr int kSegmentTokens = 512;

// Chunks of a segment. A whole sequence at most makes every source's sum one block's.
__host__ __device__ inline int64_t segment_chunks(const BoundedBackward& p) {
  return p.deterministic ? p.chunk_rows : (kSegmentTokens + p.chunk - 1) / p.chunk;
}

__device__ inline void add_pair(float* to, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
#endif
}

template <int D, int Streams>
constexpr size_t bank_shared() {
  return keys_shared<D, Streams>() + kSlotTile * sizeof(BankSlot);
}

// Gradients of what the banks hold. A block owns the slots of a tile over a segment of consecutive chunks; when a slot's occupant
// changes, or the segment ends, the sum is added to the occupant's.
template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 2) backward_bank_kernel(BoundedBackward p) {
  extern __shared__ __align__(256) unsigned char shared[];
  const KeysMemory<T, D, Streams> memory(shared);
  const int tiles = p.slots / kSlotTile, slot0 = blockIdx.x % tiles * kSlotTile;
  const int64_t segment = segment_chunks(p);
  const auto where = find_tile(p.sequences, blockIdx.x / tiles / p.kv_heads, segment,
                               [&](int64_t n) { return p.cu_seqlens[n] / p.chunk + 2 * n; });
  const HeadView view(p, where.sequence, blockIdx.x / tiles % p.kv_heads);
  const int last = static_cast<int>(min(where.begin + segment, static_cast<int64_t>(view.chunks)));

  struct Step {
    int chunk, row;
  };
  // The first step at a chunk that holds any of the slots, from `chunk` on.
  const auto enter = [&](int chunk) -> Step {
    while (chunk < last && p.used[view.snapshot(chunk)] <= slot0) ++chunk;
    return {chunk, view.begin_of(chunk) * view.group};
  };
  const auto after = [&](Step step) -> Step {
    step.row += kStep;
    return step.row < view.end_of(step.chunk) * view.group ? step : enter(step.chunk + 1);
  };
  RowWalk<D> walk;
  const auto load_step = [&](int stage, Step step) {
    if (step.row == view.begin_of(step.chunk) * view.group) walk.seek(view, step.row);
    memory.load_step(stage, view, walk, p.bank_q, p.bank_q2, step.row, view.end_of(step.chunk) * view.group);
    commit_copies();
  };
  Step step = enter(static_cast<int>(where.begin));
  if (step.chunk >= last) return;
  load_step(0, step);

  const int slot = slot0 + 16 * warp_id() + lane_id() / 4;  // the lane's first; the second is 8 further
  const float scale = static_cast<float>(p.scale), log2_scale = scale * kLog2E;
  KeyGradients<D> sum;
  sum.clear(0);
  sum.clear(1);
  int since = -1;  // the last chunk met
  // What the lane's slots held then. Not in registers, of which there are none to spare.
  auto* occupants = reinterpret_cast<BankSlot*>(memory.scalars + 2) + 16 * warp_id() + lane_id() / 4;
  occupants[0].source = occupants[8].source = INT_MIN;
  // Adds what the r-th slot gathered to its occupant's.
  const auto leave = [&](int r, float grad_bias) {
    const int s = slot + 8 * r, source = occupants[8 * r].source;
    const bool summary = source == kSummary, carried = source < view.held();
    const int64_t row = summary ? view.snapshot(since) * p.summary_slots + s - p.exact_slots
                                : carried ? view.state_row(source) : view.token_row(source - view.held());
    auto* to_k = summary ? static_cast<float*>(p.grad_summary_k) : carried ? p.state_bank_grad_k : p.bank_grad_k;
    auto* to_v = summary ? static_cast<float*>(p.grad_summary_v) : carried ? p.state_bank_grad_v : p.bank_grad_v;
    to_k += row * D + lane_id() % 4 * 2;
    to_v += row * D + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      add_pair(to_k + 8 * n, sum.k[0][n][2 * r] * scale, sum.k[0][n][2 * r + 1] * scale);
      add_pair(to_v + 8 * n, sum.v[0][n][2 * r], sum.v[0][n][2 * r + 1]);
    }
    if (lane_id() % 4 != 0) return;
    if (summary && p.mass_bias) {
      const float mass = static_cast<const float*>(p.summary_mass)[(view.row0 + since) * p.summary_slots + s - p.exact_slots];
      atomicAdd(static_cast<float*>(p.mass_partial) + row, grad_bias / mass);
    }
    if (view.biased_by_gate(s)) {
      atomicAdd(static_cast<float*>(carried ? p.state_gate_partial : p.gate_partial) + row,
                grad_bias * sigmoid(-view.gate(source)));
    }
  };
  // The warp's slots as a chunk finds them; all free after the last one.
  const auto meet = [&](int chunk) {
    int now[2];
    bool changed[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      BankSlot is{kFree, 0.0f};
      if (chunk < last) is = p.bank[view.snapshot(chunk) * p.slots + slot + 8 * r];
      now[r] = is.source;
      const int before = occupants[8 * r].source;
      changed[r] = now[r] != before || now[r] == kSummary;
      const float grad_bias = quad_sum(sum.bias[r]);
      if (changed[r] && before >= 0) {
        leave(r, grad_bias);
        sum.clear(r);
      }
      __syncwarp();
      occupants[8 * r] = is;
    }
    since = chunk;
    if (chunk == last || !__any_sync(kAllLanes, changed[0] || changed[1])) return;
    constexpr int kPackets = D / 8;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 8 * kPackets / kWarp; ++i) {
        const int row = i * (kWarp / kPackets) + lane_id() / kPackets, packet = lane_id() % kPackets;
        const int source = __shfl_sync(kAllLanes, now[r], 4 * row);
        if (!__shfl_sync(kAllLanes, changed[r], 4 * row)) continue;
        const int s = slot0 + 16 * warp_id() + 8 * r + row;
        const T* key = view.bank_row<D, T>(p.state_kbar, p.kbar, p.rounded_k, chunk, s, source);
        const T* value = view.bank_row<D, T>(p.state_v, p.v, p.rounded_v, chunk, s, source);
        const int to = place<D>(8 * r + row, packet);
        copy_packet(memory.keys + to, key ? key + packet * 8 : p.q, key);
        copy_packet(memory.values + to, key ? value + packet * 8 : p.q, key);
      }
    }
    commit_copies();
  };

  for (int stage = 0;; stage ^= 1) {
    if (step.chunk != since) meet(step.chunk);
    if (step.chunk >= last) break;
    wait_copies<0>();
    __syncthreads();
    step = after(step);
    if (step.chunk < last) load_step(stage ^ 1, step);
    gather_step(sum, memory, stage, log2_scale, [&](int, int r) { return occupants[8 * r].bias; });
  }
}

}  // namespace

cudaError_t bounded_backward_bank(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  if (params.slots == 0) return cudaSuccess;
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    const int64_t segments = tile_bound(params.chunk_rows, params.sequences, segment_chunks(params));
    const dim3 grid(static_cast<unsigned>(segments * (params.slots / kSlotTile) * params.kv_heads));
    return params.streams == 2
               ? launch(backward_bank_kernel<T, dim, 2>, grid, kThreads, bank_shared<dim, 2>(), stream, params)
               : launch(backward_bank_kernel<T, dim, 1>, grid, kThreads, bank_shared<dim, 1>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
