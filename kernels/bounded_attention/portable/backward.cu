#include "backward.h"

#include "../../common/workspace.cuh"

namespace coda::kernels::portable {
namespace {

// Lays the workspace out; from a null one it only counts bytes.
size_t lay_out(BoundedBackward& p, void* workspace, DType dtype) {
  if (p.exact_slots == 0) return 0;
  Carver carver(workspace);
  const int64_t width = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const auto take = [&](int64_t rows) { return carver.take<unsigned char>(width * rows * p.kv_heads * p.dim); };
  const int64_t held = p.sequences * (p.window + p.exact_slots);
  p.bank_grad_k = take(p.tokens);
  p.bank_grad_v = take(p.tokens);
  p.state_bank_grad_k = take(held);
  p.state_bank_grad_v = take(held);
  return carver.used();
}

}  // namespace

BackwardNeeds bounded_attention_backward_needs(const BoundedAttentionParams& params, DType dtype) {
  BoundedBackward p{};
  static_cast<BoundedAttentionParams&>(p) = params;
  return {params.streams == 2 ? bounded_backward_row_blocks(params, dtype) : 0, lay_out(p, nullptr, dtype)};
}

cudaError_t bounded_attention_backward(const BoundedAttentionBackward& params, DType dtype, cudaStream_t stream) {
  BoundedBackward p{};
  static_cast<BoundedAttentionBackward&>(p) = params;
  const size_t bytes = lay_out(p, params.workspace, dtype);
  if (bytes > 0) {
    if (const auto status = cudaMemsetAsync(params.workspace, 0, bytes, stream); status != cudaSuccess) return status;
  }
  if (params.tokens > 0) {
    if (const auto status = bounded_backward_rows(p, dtype, stream); status != cudaSuccess) return status;
    if (const auto status = bounded_backward_bank(p, dtype, stream); status != cudaSuccess) return status;
  }
  return bounded_backward_window(p, dtype, stream);
}

}  // namespace coda::kernels::portable
