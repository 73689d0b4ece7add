#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kShares = 4;  // lanes that look for the rank of one entry of a carried bank

// The bank that a sequence came with, in order of rank.
struct CarriedBank {
  struct alignas(16) Entry {
    uint64_t key;
    int64_t order;  // decides between equal keys
  };
  Entry* entry;  // (capacity)

  __host__ __device__ CarriedBank(Carver& carver, int capacity) : entry(carver.take<Entry>(capacity)) {}

  template <class A>
  __device__ void sort(const RetentionScan& p, int64_t state) const {
    const int64_t* positions = p.exact_pos + state * p.exact_slots + p.num_sinks;
    const A* gates = static_cast<const A*>(p.state_gate) + state * (p.window + p.exact_slots) + p.window + p.num_sinks;
#pragma unroll 1
    for (int j = threadIdx.x; j < p.capacity; j += blockDim.x) {
      const int64_t position = positions[j];
      const A gate = gates[j];
      // Arrivals take the slots of the last ranks: free ones fill in ascending order.
      entry[j] = position < 0 ? Entry{kFreeSlot, j} : Entry{ordered_key(retention_key(gate, p.age_decay, position)), position};
    }
    __syncthreads();
    const int share = lane_id() % kShares;
#pragma unroll 1
    for (int base = warp_id() * (kWarp / kShares); base < p.capacity; base += blockDim.x / kShares) {
      const int j = base + lane_id() / kShares;
      const Entry mine = entry[min(j, p.capacity - 1)];
      int rank = 0;
#pragma unroll 4
      for (int i = share; i < p.capacity; i += kShares) {
        const Entry other = entry[i];
        rank += (other.key > mine.key) | ((other.key == mine.key) & (other.order > mine.order));
      }
#pragma unroll
      for (int offset = kShares / 2; offset > 0; offset /= 2) rank += __shfl_xor_sync(kAllLanes, rank, offset);
      if (j >= p.capacity || share > 0) continue;
      p.carried_key[state * p.capacity + rank] = mine.key;
      p.carried_id[state * p.capacity + rank] = mine.key == kFreeSlot ? -1 : -2 - j;
      p.carried_rank[state * p.capacity + j] = rank;
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
  __device__ void sort(const RetentionScan& p, const SegmentPlan& plan, int group, int64_t row) const {
    const auto& sequence = plan.sequence;
    const int count = p.segment_tokens, offered = plan.used * p.chunk, id = plan.first_id(p);
    const A* state_gate = static_cast<const A*>(p.state_gate) + sequence.state_row(p, group) * (p.window + p.exact_slots);
    const A* gate = static_cast<const A*>(p.gate) + static_cast<int64_t>(sequence.token0) * p.gate_groups + group;
#pragma unroll 1
    for (int c = threadIdx.x; c < count; c += blockDim.x) {
      const int64_t position = sequence.evicted + id + c, fresh = position - sequence.first;
      key[c] = kNotOffered;
      if (id + c < 0 || position < p.num_sinks || c >= offered) continue;
      const A logit = fresh < 0 ? state_gate[sequence.source_of(p, position)] : gate[fresh * p.gate_groups];
      key[c] = ordered_key(retention_key(logit, p.age_decay, position));
    }
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < count; c += blockDim.x) {
      const int begin = c / kWarp * kWarp, end = min(begin + kWarp, count);
      const uint64_t mine = key[c], less = mine - 1;
      int rank = begin;
#pragma unroll 8
      for (int i = begin; i < end; ++i) rank += key[i] > (i > c ? less : mine);
      other_key[rank] = mine;
      other_token[rank] = c;
    }
    const uint64_t* from_key = other_key;
    const int* from_token = other_token;
    uint64_t* to_key = key;
    int* to_token = token;
    for (int width = kWarp; width < count; width *= 2) {
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const uint64_t mine = from_key[i];
        const bool right = i & width;
        const int begin = right ? (i & ~(2 * width - 1)) : (i & ~(width - 1)) + width;
        const int size = max(min(width, count - begin), 0);
        const int rank = i - (right ? width : 0) + count_above(from_key + min(begin, count - 1), size, right ? mine : mine - 1);
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
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      p.token_key[row * count + i] = from_key[i];
      p.token_id[row * count + i] = id + from_token[i];
    }
  }
};

// The first blocks order the banks that sequences came with, the others the tokens that leave the ring in a segment.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) retention_tokens_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ SegmentPlan plan;
  wait_for_stream();
  const int states = static_cast<int>(p.sequences) * p.gate_groups, block = static_cast<int>(blockIdx.x);
  with_block_memory(p, shared, [&](Carver& carver) {
    if (block < states) return CarriedBank(carver, p.capacity).template sort<A>(p, block);
    SegmentPlan::put(&plan, p, (block - states) / p.gate_groups);
    __syncthreads();
    if (plan.used > 0) SegmentTokens(carver, p.segment_tokens).template sort<A>(p, plan, block % p.gate_groups, block - states);
  });
}

int64_t scan_blocks(const RetentionScan& p) { return (p.sequences + p.segments) * p.gate_groups; }

size_t block_bytes(const RetentionScan& p) {
  Carver bank(nullptr), tokens(nullptr);
  CarriedBank(bank, p.capacity);
  SegmentTokens(tokens, p.segment_tokens);
  return std::max(bank.used(), tokens.used());
}

}  // namespace

size_t retention_tokens_workspace(const RetentionScan& p) {
  return workspace_part(block_bytes(p), scan_blocks(p));
}

cudaError_t retention_tokens(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  auto p = scan;
  p.block_bytes = block_bytes(scan);
  const auto kernel = dtype == DType::kFloat64 ? retention_tokens_kernel<double> : retention_tokens_kernel<float>;
  return launch_early(kernel, dim3(static_cast<unsigned>(scan_blocks(p))), kThreads, shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
