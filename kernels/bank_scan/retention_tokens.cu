#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kInRow = 4;   // places of a thread in a merge
constexpr int kAtOnce = 2;  // gates of a thread that are read at once
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
    bool held = false;
#pragma unroll 1
    for (int j = threadIdx.x; j < p.capacity; j += blockDim.x) {
      const int64_t position = positions[j];
      const A gate = gates[j];
      held |= position >= 0;
      // Arrivals take the slots of the last ranks: free ones fill in ascending order.
      entry[j] = position < 0 ? Entry{kFreeSlot, j} : Entry{ordered_key(retention_key(gate, p.age_decay, position)), position};
    }
    if (!__syncthreads_or(held)) {
#pragma unroll 1
      for (int rank = threadIdx.x; rank < p.capacity; rank += blockDim.x) {
        p.carried_key[state * p.capacity + rank] = kFreeSlot;
        p.carried_id[state * p.capacity + rank] = -1;
        p.carried_rank[state * p.capacity + rank] = p.capacity - 1 - rank;
      }
      return;
    }
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
  uint64_t *key, *other_key;  // (segment_tokens) in whole warps
  int *token, *other_token;   // (segment_tokens)

  __host__ __device__ static int padded(int tokens) { return (tokens + kWarp - 1) / kWarp * kWarp; }
  __host__ __device__ SegmentTokens(Carver& carver, int tokens)
      : key(carver.take<uint64_t>(padded(tokens))), other_key(carver.take<uint64_t>(padded(tokens))),
        token(carver.take<int>(padded(tokens))), other_token(carver.take<int>(padded(tokens))) {}

  template <class A>
  __device__ void sort(const RetentionScan& p, const SegmentPlan& plan, int group, int64_t row) const {
    const auto& sequence = plan.sequence;
    const int offered = plan.tokens(p), id = plan.first_id(p), count = padded(offered);
    const A* state_gate = static_cast<const A*>(p.state_gate) + sequence.state_row(p, group) * (p.window + p.exact_slots);
    const A* gate = static_cast<const A*>(p.gate) + static_cast<int64_t>(sequence.token0) * p.gate_groups + group;
#pragma unroll 1
    for (int base = threadIdx.x; base < count; base += kAtOnce * kThreads) {
      A logit[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int c = base + k * kThreads;
        const int64_t position = sequence.evicted + id + c, fresh = position - sequence.first;
        const A* const at = fresh < 0 ? state_gate + sequence.source_of(p, position) : gate + fresh * p.gate_groups;
        logit[k] = c < offered ? *at : A(0);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int c = base + k * kThreads;
        const int64_t position = sequence.evicted + id + c;
        if (c >= count) break;
        // Of what is not offered each has another key, and what fills up the last warp comes last.
        const bool comes = c < offered && position >= p.num_sinks;
        key[c] = comes ? ordered_key(retention_key(logit[k], p.age_decay, position)) : kNotOffered + (count - 1 - c);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < count; c += kThreads) {
      const uint64_t mine = key[c];
      const uint64_t* const run = key + c / kWarp * kWarp;
      int rank = 0;
#pragma unroll 8
      for (int i = 0; i < kWarp; i += 2) {
        const auto two = *reinterpret_cast<const ulonglong2*>(run + i);
        rank += (two.x > mine) + (two.y > mine);
      }
      if (__reduce_or_sync(kAllLanes, 1u << rank) != kAllLanes) {  // equal keys share a rank
#pragma unroll 4
        for (int i = 0; i < kWarp; ++i) rank += (i > lane_id()) & (run[i] == mine);
      }
      other_key[c / kWarp * kWarp + rank] = mine;
      other_token[c / kWarp * kWarp + rank] = c;
    }
    uint64_t *from_key = other_key, *to_key = key;
    int *from_token = other_token, *to_token = token;
    for (int width = kWarp; width < count; width *= 2) {
      __syncthreads();
#pragma unroll 1
      for (int to = kInRow * static_cast<int>(threadIdx.x); to < count; to += kInRow * kThreads) {
        const int begin = to & ~(2 * width - 1), middle = min(begin + width, count), last = min(middle + width, count);
        uint64_t keys[kInRow];
        int ids[kInRow];
        merge_places(from_key + begin, from_token + begin, middle - begin, from_key + middle, from_token + middle, last - middle,
                     to - begin, keys, ids);
#pragma unroll
        for (int k = 0; k < kInRow; ++k) {
          to_key[to + k] = keys[k];
          to_token[to + k] = ids[k];
        }
      }
      uint64_t* const keys = from_key;
      int* const tokens = from_token;
      from_key = to_key;
      from_token = to_token;
      to_key = keys;
      to_token = tokens;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < offered; i += kThreads) {
      p.token_key[row * p.segment_tokens + i] = from_key[i];
      p.token_id[row * p.segment_tokens + i] = id + from_token[i];
    }
  }
};

// The first blocks sort the tokens that leave the ring in a segment, others the banks that sequences came with, and the last ones
// copy the ring into the new state: that waits for memory, the others do not.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) retention_tokens_kernel(RetentionScan p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ SegmentPlan plan;
  wait_for_stream();
  const int cuts = static_cast<int>(p.segments) * p.gate_groups, states = static_cast<int>(p.sequences) * p.gate_groups;
  const int block = static_cast<int>(blockIdx.x);
  if (block < cuts + states) {
    with_block_memory(p, shared, [&](Carver& carver) {
      if (block >= cuts) return CarriedBank(carver, p.capacity).template sort<A>(p, block - cuts);
      SegmentPlan::put(&plan, p, block / p.gate_groups);
      __syncthreads();
      if (plan.used > 0) SegmentTokens(carver, p.segment_tokens).template sort<A>(p, plan, block % p.gate_groups, block);
    });
  } else {
    copy_ring_part<T>(p, block - cuts - states, p.copied, p.wide);
  }
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
  const dim3 grid(static_cast<unsigned>(scan_blocks(p) + ring_parts(p, kWarps, p.copied)));
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    p.wide = wide_rows<T>(p);
    return launch_early(retention_tokens_kernel<T>, grid, kThreads, shared_part(p.block_bytes), stream, p);
  });
}

}  // namespace coda::kernels
