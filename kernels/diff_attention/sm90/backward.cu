#include "backward.h"

#include "../../common/sequences.cuh"
#include "../../common/workspace.cuh"
#include "../launch.h"
#include "tiles.cuh"

namespace coda::kernels {
namespace {

using sm90::BackwardArguments;

// Fills in the parts of the workspace; returns its size.
size_t lay_out(BackwardArguments& p, void* workspace) {
  const bool packed = p.cu_seqlens_q != nullptr;
  p.tiles = packed ? tile_bound(p.queries, p.sequences, sm90::kQueryTile)
                   : p.sequences * ((p.length_q + sm90::kQueryTile - 1) / sm90::kQueryTile);
  const int64_t elements = (packed ? p.tiles * sm90::kQueryTile : p.queries) * p.heads * p.dim;
  const bool turned = p.streams == 2;
  Carver memory(workspace);
  p.angles = memory.take<float>(turned ? p.heads * p.dim : 0);
  p.numbers = memory.take<float>(p.heads * p.tiles * sm90::query_numbers(p.streams) * sm90::kQueryTile);
  p.grad_q_sums = memory.take<float>(p.heads * p.tiles * sm90::kQueryTile * p.dim);
  p.turned_q = memory.take<uint16_t>(turned ? elements : 0);
  p.tiled_q = memory.take<uint16_t>(packed ? elements : 0);
  p.tiled_grad = memory.take<uint16_t>(packed ? elements : 0);
  if (!turned) p.angles = nullptr;
  if (!turned) p.turned_q = nullptr;
  if (!packed) p.tiled_q = p.tiled_grad = nullptr;
  return memory.used();
}

cudaError_t make_maps(BackwardArguments& p, DType dtype) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t sequences = packed ? 1 : p.sequences, keys = packed ? p.keys : p.length_k;
  const int64_t queries = packed ? p.tiles * sm90::kQueryTile : p.length_q;
  const Strides contiguous{p.length_q * p.heads * p.dim, static_cast<int64_t>(p.heads) * p.dim, p.dim};
  const auto query_map = [&](CUtensorMap& map, const void* base, const Strides& strides) {
    return make_tensor_map(map, base, dtype, sm90::head_tile(p.dim, p.heads, queries, sequences, strides, sm90::kQueryTile));
  };
  const auto key_map = [&](CUtensorMap& map, const void* base, const Strides& strides, uint32_t columns) {
    auto shape = sm90::head_tile(p.dim, p.kv_heads, keys, sequences, strides, sm90::kKeyBlock);
    shape.box[0] = columns;
    return make_tensor_map(map, base, dtype, shape);
  };
  auto status = query_map(p.q_map, packed ? p.tiled_q : p.q, packed ? contiguous : p.q_strides);
  if (status == cudaSuccess) status = query_map(p.grad_map, packed ? p.tiled_grad : p.grad_diff, contiguous);
  if (status == cudaSuccess && p.turned_q) status = query_map(p.turned_q_map, p.turned_q, contiguous);
  if (status == cudaSuccess) status = key_map(p.k_map, p.k, p.k_strides, 32);
  if (status == cudaSuccess) status = key_map(p.v_map, p.v, p.v_strides, 64);
  return status;
}

}  // namespace

BackwardNeeds sm90::diff_attention_backward_needs(const DiffAttentionParams& params, DType) {
  BackwardArguments p{};
  static_cast<DiffAttentionParams&>(p) = params;
  const int64_t blocks = p.cu_seqlens_k ? tile_bound(p.keys, p.sequences, kKeyBlock)
                                        : p.sequences * ((p.length_k + kKeyBlock - 1) / kKeyBlock);
  // With D 64 both warpgroups of a block have a share of every pair.
  return {blocks * (p.dim == 64 ? 2 : 1), lay_out(p, nullptr)};
}

cudaError_t sm90::diff_attention_backward(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream) {
  BackwardArguments p{};
  static_cast<DiffAttentionBackward&>(p) = params;
  lay_out(p, p.workspace);
  p.log2_scale = static_cast<float>(p.scale * 1.4426950408889634);
  const auto clear = [&](void* to, int64_t elements) { return cudaMemsetAsync(to, 0, elements * 2, stream); };
  if (p.queries == 0 || p.keys == 0) {
    auto status = clear(p.grad_q, p.queries * p.heads * p.dim);
    if (status == cudaSuccess) status = clear(p.grad_k, p.keys * p.kv_heads * p.dim);
    if (status == cudaSuccess) status = clear(p.grad_v, p.keys * p.kv_heads * p.dim);
    return status;
  }
  auto status = make_maps(p, dtype);
  if (status == cudaSuccess) status = queries_before(p, dtype, stream);
  if (status != cudaSuccess) return status;
  if (p.dim == 64) {
    status = dtype == DType::kBFloat16 ? key_blocks_d64_bf16(p, stream) : key_blocks_d64_fp16(p, stream);
  } else {
    status = dtype == DType::kBFloat16 ? key_blocks_d128_bf16(p, stream) : key_blocks_d128_fp16(p, stream);
  }
  return status == cudaSuccess ? queries_after(p, dtype, stream) : status;
}

}  // namespace coda::kernels
