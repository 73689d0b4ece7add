#include "backward.cuh"

namespace coda::kernels::sm80 {
namespace {

constexpr int kCollectWarps = 8;
constexpr int kWarpRows = 4;  // few of them have anything to collect

// Makes one of the parts that the bank kernel left for a source, turns the key's from position 0 to the key's own, and writes the
// gate's gradient. Rows are those of new tokens, (T, Hkv), then those of the state, (N, Hkv, W + Me).
template <int D>
__global__ void __launch_bounds__(kCollectWarps * kWarp, 4) collect_kernel(BoundedBackward p) {
  const int64_t new_rows = p.tokens * p.kv_heads, rows = new_rows + p.sequences * p.kv_heads * (p.window + p.exact_slots);
  const int64_t row0 = (blockIdx.x * static_cast<int64_t>(kCollectWarps) + warp_id()) * kWarpRows;
  const int64_t mine = row0 + lane_id();
  const bool real = lane_id() < kWarpRows && mine < rows;
  const int found = real ? (mine < new_rows ? p.entry[mine] : p.state_entry[mine - new_rows]) : 0;
  for (unsigned left = __ballot_sync(kAllLanes, found != 0); left; left &= left - 1) {
    const int lane = __ffs(left) - 1, entry = __shfl_sync(kAllLanes, found, lane) - 1;
    const bool carried = row0 + lane >= new_rows;
    const int64_t row = row0 + lane - (carried ? new_rows : 0);
    const int held = p.window + p.exact_slots;
    const int64_t token = row / p.kv_heads;  // where not carried
    const int64_t n = carried ? row / held / p.kv_heads
                              : find_sequence(p.sequences, token, [&](int64_t m) { return p.cu_seqlens[m]; });
    const HeadView view(p, n, static_cast<int>(carried ? row / held % p.kv_heads : row % p.kv_heads));
    const int source = static_cast<int>(carried ? row % held : held + token - view.token0), slot = entry % p.slots;
    // Segments after that of entry at whose beginning it still stands in its slot.
    const int begin = entry / p.slots + 1;
    int end = begin;
    for (unsigned standing = kAllLanes; standing == kAllLanes;) {
      const int chunk = (end + lane_id()) * p.segment;
      standing = __ballot_sync(kAllLanes, chunk < view.chunks && p.bank[view.snapshot(chunk) * p.slots + slot].source == source);
      end += standing == kAllLanes ? kWarp : __ffs(~standing) - 1;
    }
    const auto add_segments = [&](float* to, const float* from, int size) {
      for (int d = lane_id(); d < size; d += kWarp) {
        float sum = to[row * size + d];
#pragma unroll 4
        for (int s = begin; s < end; ++s) sum += from[view.segment_row(p.segment, s, slot) * size + d];
        to[row * size + d] = sum;
      }
    };
    float* grad_k = carried ? p.state_bank_grad_k : p.bank_grad_k;
    add_segments(grad_k, p.segment_grad_k, D);
    add_segments(carried ? p.state_bank_grad_v : p.bank_grad_v, p.segment_grad_v, D);
    if (biased_by_gate(p, slot)) {
      float* bias = carried ? p.state_bank_grad_bias : p.bank_grad_bias;
      add_segments(bias, p.segment_grad_bias, 1);
      auto* gate = static_cast<float*>(carried ? p.state_gate_partial : p.gate_partial);
      if (lane_id() == 0) gate[row] = bias[row] * sigmoid(-view.gate(p, source));
    }
    if (p.has_bank_distance && (!carried || source < p.window)) {
      const int64_t position = carried ? ring_position(view.first, source, p.window) : view.first + token - view.token0;
      rotate_row(grad_k + row * D, D, p.rope_interleaved, [&](int i) { return rope_angle<float>(position, p.inv_freq[i]); });
    }
  }
}

}  // namespace

cudaError_t bounded_backward_collect(const BoundedBackward& params, DType, cudaStream_t stream) {
  if (params.exact_slots == 0) return cudaSuccess;
  const int64_t rows = (params.tokens + params.sequences * (params.window + params.exact_slots)) * params.kv_heads;
  const dim3 grid(static_cast<unsigned>((rows + kCollectWarps * kWarpRows - 1) / (kCollectWarps * kWarpRows)));
  return launch(params.dim == 64 ? collect_kernel<64> : collect_kernel<128>, grid, kCollectWarps * kWarp, 0, stream, params);
}

}  // namespace coda::kernels::sm80
