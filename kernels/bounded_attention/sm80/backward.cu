#include "../../common/workspace.cuh"
#include "backward.cuh"

namespace coda::kernels::sm80 {
namespace {

struct Layout {
  size_t bytes;
  size_t marks;  // bytes of banked and state_banked, which lie together
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
  p.state_bank_grad_k = carver.take<float>(held * dim);
  p.state_bank_grad_v = carver.take<float>(held * dim);
  const size_t before = carver.used();
  p.banked = carver.take<uint8_t>(tokens);
  p.state_banked = carver.take<uint8_t>(held);
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
  if (layout.marks > 0) {
    if (const auto status = cudaMemsetAsync(p.banked, 0, layout.marks, stream); status != cudaSuccess) return status;
  }
  if (params.tokens > 0) {
    for (const auto step : {bounded_backward_prepare, bounded_backward_rows, bounded_backward_bank}) {
      if (const auto status = step(p, dtype, stream); status != cudaSuccess) return status;
    }
  }
  return bounded_backward_window(p, dtype, stream);
}

}  // namespace coda::kernels::sm80
