#include "keys.cuh"

namespace coda::kernels::sm80 {
namespace {

template <int D, int Streams>
constexpr size_t bank_shared() {
  return keys_shared<D, Streams>() + kSlotTile * sizeof(BankSlot);
}

// Gradients of what the banks hold. A block owns the slots of a tile over a segment of consecutive chunks; when a slot's occupant
// changes, or the segment ends, its sum is written. No other block writes there.
template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 2) backward_bank_kernel(const __grid_constant__ BoundedBackward p) {
  extern __shared__ __align__(256) unsigned char shared[];
  const KeysMemory<T, D, Streams> memory(shared);
  const int tiles = p.slots / kSlotTile, slot0 = blockIdx.x % tiles * kSlotTile;
  const auto where = find_tile(p.sequences, blockIdx.x / tiles / p.kv_heads, p.segment,
                               [&](int64_t n) { return p.cu_seqlens[n] / p.chunk + 2 * n; });
  const HeadView& view = block_view(p, where.sequence, blockIdx.x / tiles % p.kv_heads);
  const int last = static_cast<int>(min(where.begin + p.segment, static_cast<int64_t>(view.chunks)));

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
    memory.load_step(p, view, p.bank_q, p.bank_q2, walk, stage, step.row, view.end_of(step.chunk) * view.group);
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
  // What the warp's slots held then, and of those the lane's. Not in registers, of which there are none to spare.
  auto* held = reinterpret_cast<BankSlot*>(memory.scalars + 2) + 16 * warp_id();
  auto* occupants = held + lane_id() / 4;
  occupants[0].source = occupants[8].source = INT_MIN;
  __syncwarp();
  // Writes what the r-th slot gathered to its occupant's place.
  const auto leave = [&](int r, float grad_bias) {
    const int s = slot + 8 * r, source = occupants[8 * r].source;
    const int begin = (last - 1) / p.segment * p.segment;
    float *to_k, *to_v, *to_bias;
    int64_t row;
    if (source == kSummary) {
      row = view.snapshot(since) * p.summary_slots + s - p.exact_slots;
      to_k = static_cast<float*>(p.grad_summary_k);
      to_v = static_cast<float*>(p.grad_summary_v);
      to_bias = static_cast<float*>(p.mass_partial);
      grad_bias /= static_cast<const float*>(p.summary_mass)[(view.row0 + since) * p.summary_slots + s - p.exact_slots];
    } else if (begin > 0 && p.bank[view.snapshot(begin - 1) * p.slots + s].source == source) {
      row = view.segment_row(p.segment, begin / p.segment, s);
      to_k = p.segment_grad_k;
      to_v = p.segment_grad_v;
      to_bias = p.segment_grad_bias;
    } else {
      const bool carried = source < view.held;
      row = carried ? view.state_row(source) : view.token_row(source - view.held);
      to_k = carried ? p.state_bank_grad_k : p.bank_grad_k;
      to_v = carried ? p.state_bank_grad_v : p.bank_grad_v;
      to_bias = carried ? p.state_bank_grad_bias : p.bank_grad_bias;
    }
    if (lane_id() % 4 == 0 && (source != kSummary || p.mass_bias)) to_bias[row] = grad_bias;
    to_k += row * D + lane_id() % 4 * 2;
    to_v += row * D + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<float2*>(to_k + 8 * n) = {sum.k[0][n][2 * r] * scale, sum.k[0][n][2 * r + 1] * scale};
      *reinterpret_cast<float2*>(to_v + 8 * n) = {sum.v[0][n][2 * r], sum.v[0][n][2 * r + 1]};
    }
  };
  // The warp's slots as a chunk finds them; all free after the last one.
  const auto meet = [&](int chunk) {
    unsigned changed[2];  // by lane
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      BankSlot is{kFree, 0.0f};
      if (chunk < last) is = p.bank[view.snapshot(chunk) * p.slots + slot + 8 * r];
      const int before = occupants[8 * r].source;
      const bool differs = is.source != before || is.source == kSummary;
      const float grad_bias = quad_sum(sum.bias[r]);
      if (differs && before >= 0) {
        leave(r, grad_bias);
        sum.clear(r);
      }
      changed[r] = __ballot_sync(kAllLanes, differs);
      __syncwarp();  // The four lanes of a slot have read who was there.
      occupants[8 * r] = is;
    }
    since = chunk;
    if (chunk == last || (changed[0] | changed[1]) == 0) return;
    __syncwarp();
    constexpr int kPackets = D / 8;
#pragma unroll 1
    for (int row = lane_id() / kPackets; row < 16; row += kWarp / kPackets) {
      if (((row < 8 ? changed[0] : changed[1]) >> row % 8 * 4 & 1) == 0) continue;
      const int s = slot0 + 16 * warp_id() + row, packet = lane_id() % kPackets, to = place<D>(row, packet);
      const T* key = view.bank_row<D, T>(p, p.state_kbar, p.kbar, p.rounded_k, chunk, s, held[row].source);
      const T* value = view.bank_row<D, T>(p, p.state_v, p.v, p.rounded_v, chunk, s, held[row].source);
      copy_packet(memory.keys + to, key ? key + packet * 8 : p.q, key);
      copy_packet(memory.values + to, key ? value + packet * 8 : p.q, key);
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
    const int64_t segments = tile_bound(params.chunk_rows, params.sequences, params.segment);
    const dim3 grid(static_cast<unsigned>(segments * (params.slots / kSlotTile) * params.kv_heads));
    return params.streams == 2
               ? launch(backward_bank_kernel<T, dim, 2>, grid, kThreads, bank_shared<dim, 2>(), stream, params)
               : launch(backward_bank_kernel<T, dim, 1>, grid, kThreads, bank_shared<dim, 1>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
