#include "../../common/fragments.cuh"
#include "../../common/launch.cuh"
#include "../launch.h"
#include "forward.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;

// Summary slots in the storage type, a packet a thread: the attention has no registers to round them in.
template <class T>
__global__ void __launch_bounds__(kThreads) round_summaries(BoundedAttentionForward p) {
  wait_for_stream();  // first, as in the preparation
  let_next_start();
  const int64_t packets = p.chunk_rows * p.kv_heads * p.summary_slots * (p.dim / kPacket);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= packets) return;
  const auto* from = static_cast<const float4*>(blockIdx.y ? p.summary_v : p.summary_k) + 2 * i;
  const float4 a = from[0], b = from[1];
  const float x[kPacket] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  store_packet(static_cast<T*>(p.summary_rounded) + (blockIdx.y * packets + i) * kPacket, x);
}

cudaError_t round_summaries(const BoundedAttentionForward& p, DType dtype, cudaStream_t stream) {
  const int64_t packets = p.chunk_rows * p.kv_heads * p.summary_slots * (p.dim / kPacket);
  const dim3 grid(static_cast<unsigned>((packets + kThreads - 1) / kThreads), 2);
  return dtype == DType::kBFloat16 ? launch_early(round_summaries<__nv_bfloat16>, grid, kThreads, 0, stream, p)
                                   : launch_early(round_summaries<__half>, grid, kThreads, 0, stream, p);
}

}  // namespace

cudaError_t sm90::bounded_attention_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  const auto status = round_summaries(params, dtype, stream);
  if (status != cudaSuccess) return status;
  return params.dim == 64 ? bounded::forward_d64(params, dtype, stream) : bounded::forward_d128(params, dtype, stream);
}

}  // namespace coda::kernels
