#include <algorithm>

#include "../../common/workspace.cuh"
#include "backward.cuh"

namespace coda::kernels::sm80 {
namespace {

struct Layout {
  size_t bytes;
  size_t entries;  // bytes of entry and state_entry, which lie together
};

// Lays the workspace out; from a null one it only counts bytes.
Layout lay_out(BoundedBackward& p, void* workspace) {
  Carver carver(workspace);
  const int64_t dim = p.dim, held = p.sequences * (p.window + p.exact_slots) * p.kv_heads, tokens = p.tokens * p.kv_heads;
  const int64_t snapshots = p.chunk_rows * p.kv_heads;
  const int bank = p.exact_slots + p.summary_slots;
  const bool turned = bank > 0 && p.has_bank_distance;
  const auto queries = [&](bool needed) {
    return static_cast<void*>(needed ? carver.take<uint16_t>(p.tokens * p.heads * dim) : nullptr);
  };
  // Segments are so short that one long sequence fills the device, and a short one as far as it can.
  p.segment = static_cast<int>(std::max<int64_t>(std::min<int64_t>(p.tokens / 16, 512) / p.chunk, 1));
  p.slots = (bank + kSlotTile - 1) / kSlotTile * kSlotTile;
  p.q2 = queries(p.streams == 2);
  p.bank_q = turned ? queries(true) : const_cast<void*>(p.q);
  p.bank_q2 = turned ? queries(p.streams == 2) : p.q2;
  p.rounded_k = carver.take<uint16_t>(snapshots * p.summary_slots * dim);
  p.rounded_v = carver.take<uint16_t>(snapshots * p.summary_slots * dim);
  p.bank = carver.take<BankSlot>(snapshots * p.slots);
  p.used = carver.take<int32_t>(snapshots);
  p.scalars = carver.take<RowScalars>(p.tokens * p.heads);
  p.row_lam = p.streams == 2 ? carver.take<float>(p.tokens * p.heads) : nullptr;
  p.theta_angles = carver.take<Angle<float>>(p.heads * dim / 2);
  p.bank_angles = carver.take<Angle<float>>(p.chunk_rows * dim / 2);
  if (p.exact_slots == 0) return {carver.used(), 0};
  p.bank_grad_k = carver.take<float>(tokens * dim);
  p.bank_grad_v = carver.take<float>(tokens * dim);
  p.bank_grad_bias = carver.take<float>(tokens);
  p.state_bank_grad_k = carver.take<float>(held * dim);
  p.state_bank_grad_v = carver.take<float>(held * dim);
  p.state_bank_grad_bias = carver.take<float>(held);
  const int64_t rows = p.chunk_rows / p.segment * p.kv_heads * p.slots;
  p.segment_grad_k = carver.take<float>(rows * dim);
  p.segment_grad_v = carver.take<float>(rows * dim);
  p.segment_grad_bias = carver.take<float>(rows);
  const size_t before = carver.used();
  p.entry = carver.take<int32_t>(tokens);
  p.state_entry = carver.take<int32_t>(held);
  return {carver.used(), carver.used() - before};
}

}  // namespace

BackwardNeeds bounded_attention_backward_needs(const BoundedAttentionParams& params, DType) {
  BoundedBackward p{};
  static_cast<BoundedAttentionParams&>(p) = params;
  return {params.streams == 2 ? params.chunk_rows * row_tiles(params) : 0, lay_out(p, nullptr).bytes};
}

cudaError_t bounded_attention_backward(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream) {
  BoundedBackward p{};
  static_cast<BoundedAttentionBackward&>(p) = params;
  const auto layout = lay_out(p, params.workspace);
  if (p.dim == 64) RowWalk<64>::measure(p);
  if (p.dim == 128) RowWalk<128>::measure(p);
  if (layout.entries > 0) {
    if (const auto status = cudaMemsetAsync(p.entry, 0, layout.entries, stream); status != cudaSuccess) return status;
  }
  if (params.tokens > 0) {
    for (const auto step :
         {bounded_backward_prepare, bounded_backward_rows, bounded_backward_bank, bounded_backward_collect}) {
      if (const auto status = step(p, dtype, stream); status != cudaSuccess) return status;
    }
  }
  return bounded_backward_window(p, dtype, stream);
}

}  // namespace coda::kernels::sm80
