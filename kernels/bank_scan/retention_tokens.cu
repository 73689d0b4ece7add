#include "retention_segments.cuh"

#include <algorithm>

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;

// The bank that a sequence came with, in order of rank.
struct CarriedBank {
  uint64_t* key;   // (capacity)
  int64_t* order;  // (capacity) decides between equal keys

  __host__ __device__ CarriedBank(Carver& carver, int capacity)
      : key(carver.take<uint64_t>(capacity)), order(carver.take<int64_t>(capacity)) {}

  template <class A>
  __device__ void sort(const RetentionView<A>& view) const {
    const auto& p = view.scan;
    for (int j = threadIdx.x; j < p.capacity; j += blockDim.x) {
      const int slot = p.num_sinks + j;
      const int64_t position = p.exact_pos[view.state_exact() + slot];
      const bool free = position < 0;
      key[j] = free ? kFreeSlot : ordered_key(retention_key(view.gate(p.window + slot, view.group), p.age_decay, position));
      order[j] = free ? j : position;  // arrivals take the slots of the last ranks: free ones fill in ascending order
    }
    __syncthreads();
    const int64_t row = view.bank_row(0) * p.capacity;
    for (int j = threadIdx.x; j < p.capacity; j += blockDim.x) {
      int rank = 0;
      for (int i = 0; i < p.capacity; ++i) rank += key[i] > key[j] || (key[i] == key[j] && order[i] > order[j]);
      p.bank_key[row + rank] = key[j];
      p.bank_id[row + rank] = key[j] == kFreeSlot ? -1 : -2 - j;
      p.bank_slot[row + rank] = j;
    }
  }
};

// The tokens of a segment, sorted by merging; between equal keys the later token comes first.
struct SegmentTokens {
  uint64_t *key, *other_key;  // (segment_tokens)
  int *token, *other_token;   // (segment_tokens)

  __host__ __device__ SegmentTokens(Carver& carver, int tokens)
      : key(carver.take<uint64_t>(tokens)), other_key(carver.take<uint64_t>(tokens)), token(carver.take<int>(tokens)),
        other_token(carver.take<int>(tokens)) {}

  template <class A>
  __device__ void sort(const RetentionSegment<A>& segment) const {
    const auto& p = segment.p;
    const auto& view = segment.view;
    const int count = p.segment_tokens, offered = segment.used_rows() * p.chunk, id = view.first_id(segment.tile.begin);
    for (int c = threadIdx.x; c < count; c += blockDim.x) {
      const int64_t position = view.evicted + id + c;
      const bool candidate = id + c >= 0 && position >= p.num_sinks && c < offered;
      key[c] = candidate ? ordered_key(retention_key(view.gate(view.source_of(position), view.group), p.age_decay, position))
                         : kNotOffered;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < count; c += blockDim.x) {
      const int begin = c / kWarp * kWarp, end = min(begin + kWarp, count);
      const uint64_t mine = key[c];
      int rank = begin;
#pragma unroll 8
      for (int i = begin; i < end; ++i) rank += key[i] > mine - (i > c);
      other_key[rank] = mine;
      other_token[rank] = c;
    }
    const uint64_t* from_key = other_key;
    const int* from_token = other_token;
    uint64_t* to_key = key;
    int* to_token = token;
    for (int width = kWarp; width < count; width *= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const uint64_t mine = from_key[i];
        const bool right = i & width;
        const int begin = right ? (i & ~(2 * width - 1)) : (i & ~(width - 1)) + width;
        const int size = max(min(width, count - begin), 0);
        const int rank = i - (right ? width : 0) + count_above(from_key + begin, size, right ? mine : mine - 1);
        to_key[rank] = mine;
        to_token[rank] = from_token[i];
      }
      uint64_t* const keys = const_cast<uint64_t*>(from_key);
      int* const tokens = const_cast<int*>(from_token);
      from_key = to_key;
      from_token = to_token;
      to_key = keys;
      to_token = tokens;
    }
    __syncthreads();
    const int64_t row = view.segment_row(segment.number()) * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      p.token_key[row + i] = from_key[i];
      p.token[row + i] = from_token[i];
    }
  }
};

// The first blocks order the banks that sequences came with, the others the tokens that leave the ring in a segment.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) retention_tokens_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const int64_t states = p.sequences * p.gate_groups;
  if (blockIdx.x < states) {
    const RetentionView<A> view(p, blockIdx.x / p.gate_groups, static_cast<int>(blockIdx.x % p.gate_groups));
    CarriedBank(carver, p.capacity).sort(view);
    return;
  }
  const RetentionSegment<A> segment(p, blockIdx.x - states);
  if (segment.used_rows() > 0) SegmentTokens(carver, p.segment_tokens).sort(segment);
}

}  // namespace

size_t retention_tokens_block(const RetentionScan& p) {
  Carver bank(nullptr), tokens(nullptr);
  CarriedBank(bank, p.capacity);
  SegmentTokens(tokens, p.segment_tokens);
  return std::max(bank.used(), tokens.used());
}

cudaError_t retention_tokens(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  RetentionScan p = scan;
  p.block_bytes = retention_tokens_block(scan);
  const dim3 grid(static_cast<unsigned>((p.sequences + p.segments) * p.gate_groups));
  const auto kernel = dtype == DType::kFloat64 ? retention_tokens_kernel<double> : retention_tokens_kernel<float>;
  return launch(kernel, grid, kThreads, shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
