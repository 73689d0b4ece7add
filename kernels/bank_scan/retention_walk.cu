#include "retention_segments.cuh"

#include <algorithm>

namespace coda::kernels {
namespace {

// A set of small integers that counts its members below any number.
struct RankedSet {
  unsigned* member;  // (words) bits
  int* before;       // (words + 1) members in earlier words

  __device__ int below(int i) const { return before[i / 32] + __popc(member[i / 32] & ((1u << i % 32) - 1)); }

  // One warp; the bits are set.
  __device__ void count(int words) const {
    int total = 0;
    for (int base = 0; base < words; base += kWarp) {
      const int w = base + lane_id(), mine = w < words ? __popc(member[w]) : 0;
      int sum = mine;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane_id() >= offset) sum += other;
      }
      if (w < words) before[w] = total + sum - mine;
      total += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane_id() == 0) before[words] = total;
  }
};

constexpr int kMostThreads = 640;

__host__ __device__ inline int words_of(int count) { return (count + 31) / 32; }

// Entries are the ranks of the bank before the segment, then its tokens in order of key. Their places are those in the order of
// all keys together.
struct WalkMemory {
  int words;
  uint64_t* bank;    // (capacity)
  uint64_t* key;     // (segment_tokens)
  int* token;        // (segment_tokens)
  int* place;        // (entries)
  int* born;         // (entries), by place: the chunk that brings it, 0 for the bank
  unsigned* member;  // (segment_chunks, words) of the sets: places that the bank or the chunks up to this one bring
  int* before;       // (segment_chunks, words + 1)
  int2* stay;        // (entries) the first chunk in which an entry is no longer held, 0 for tokens that never were, and its last
                     // rank before
  int* arrives;      // (segment_tokens) whether a token does; where born was
  unsigned* arrival_member;  // (words) of the set of tokens that do
  int* arrival_before;       // (words + 1)
  int* leaver;       // (segment_tokens) the entry whose slot the i-th arrival takes; where place was

  __host__ __device__ WalkMemory(Carver& carver, int capacity, int tokens, int chunks)
      : words(words_of(capacity + tokens)), bank(carver.take<uint64_t>(capacity)), key(carver.take<uint64_t>(tokens)),
        token(carver.take<int>(tokens)), place(carver.take<int>(capacity + tokens)), born(carver.take<int>(capacity + tokens)),
        member(carver.take<unsigned>(chunks * words)), before(carver.take<int>(chunks * (words + 1))),
        stay(carver.take<int2>(capacity + tokens)), arrives(born), arrival_member(carver.take<unsigned>(words_of(tokens) + 1)),
        arrival_before(carver.take<int>(words_of(tokens) + 1)), leaver(place) {}

  // What has come when chunk b of the segment reads the bank.
  __device__ RankedSet come(int b) const { return {member + b * words, before + b * (words + 1)}; }
  __device__ RankedSet arrivals() const { return {arrival_member, arrival_before}; }
};

// One block finds what comes and goes in one segment, given the bank before it, and which slot each arrival takes.
__global__ void __launch_bounds__(kMostThreads, 2) retention_walk_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int segment = static_cast<int>(blockIdx.x) / p.gate_groups, sequence = p.plan[segment].sequence.number;
  if (p.plan[segment].used == 0) return;
  const int capacity = p.capacity, tokens = p.segment_tokens, chunk = p.chunk, chunks = p.segment_chunks;
  const int entries = capacity + tokens;
  const int64_t row = blockIdx.x, bank_row = row + static_cast<int64_t>(sequence) * p.gate_groups;
  with_block_memory(p, shared, [&](Carver& carver) {
    const WalkMemory work(carver, capacity, tokens, chunks);
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
      const int i = e - capacity;
      if (i < 0) {
        work.bank[e] = p.bank_key[bank_row * capacity + e];
      } else {
        work.key[i] = p.token_key[row * tokens + i];
        work.token[i] = p.token[row * tokens + i];
      }
    }
    __syncthreads();
    // Between equal keys the later token comes first.
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
      const int i = e - capacity;
      const int place = i < 0 ? e + count_above(work.key, tokens, work.bank[e] - 1)
                              : i + count_above(work.bank, capacity, work.key[i]);
      work.place[e] = place;
      work.born[place] = i < 0 ? 0 : work.token[i] / chunk;
    }
    __syncthreads();
    for (int w = warp_id(); w < work.words; w += warp_count()) {
      const int place = 32 * w + lane_id();
      const int born = place < entries ? work.born[place] : chunks;
#pragma unroll 1  // registers
      for (int b = 0; b < chunks; ++b) {
        const unsigned mask = __ballot_sync(kAllLanes, born <= b);
        if (lane_id() == 0) work.come(b).member[w] = mask;
      }
    }
    __syncthreads();
    for (int b = warp_id(); b < chunks; b += warp_count()) work.come(b).count(work.words);
    __syncthreads();
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
      const int i = e - capacity, place = work.place[e], born = i < 0 ? 0 : work.token[i] / chunk;
      int low = born, high = chunks;
      while (low < high) {
        const int b = (low + high) / 2;
        if (work.come(b).below(place) >= capacity) {
          high = b;
        } else {
          low = b + 1;
        }
      }
      const bool arrives = i >= 0 && low > born;
      if (i >= 0) work.arrives[work.token[i]] = arrives;
      work.stay[e] = {i < 0 || arrives ? low : 0, low > 0 ? work.come(low - 1).below(place) : e};
    }
    __syncthreads();
    for (int w = warp_id(); w < words_of(tokens); w += warp_count()) {
      const int c = 32 * w + lane_id();
      const unsigned mask = __ballot_sync(kAllLanes, c < tokens && work.arrives[c]);
      if (lane_id() == 0) work.arrival_member[w] = mask;
    }
    __syncthreads();
    const auto arrivals = work.arrivals();
    if (warp_id() == 0) arrivals.count(words_of(tokens));
    __syncthreads();
    // The k-th arrival of a chunk takes the slot of the k-th from the end of the bank before it. Then so does the i-th arrival of
    // the segment, if what leaves is numbered on from chunk to chunk.
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
      const int2 stay = work.stay[e];
      if (stay.x < chunks && (e < capacity || stay.x > 0)) {
        work.leaver[arrivals.below(stay.x * chunk) + capacity - 1 - stay.y] = e;
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
      const int2 stay = work.stay[e];
      const int i = e - capacity;
      int held = e;
      while (stay.x > 0 && held >= capacity) held = work.leaver[arrivals.below(work.token[held - capacity])];
      if (i < 0) {
        p.bank_until[row * capacity + e] = stay.x;
      } else {
        p.token_stay[row * tokens + work.token[i]] = {stay.x, held};
      }
      if (stay.x == chunks) p.rank_after[row * capacity + held] = stay.y;
    }
    if (threadIdx.x == 0) add_count(p.new_counts + 2 * sequence, arrivals.before[words_of(tokens)]);
  });
}

}  // namespace

size_t retention_walk_block(const RetentionScan& p) {
  Carver sizes(nullptr);
  WalkMemory(sizes, p.capacity, p.segment_tokens, p.segment_chunks);
  return sizes.used();
}

cudaError_t retention_walk(const RetentionScan& scan, cudaStream_t stream) {
  RetentionScan p = scan;
  p.block_bytes = retention_walk_block(scan);
  const int threads = std::clamp((p.capacity + p.segment_tokens + kWarp - 1) / kWarp * kWarp, kWarp, kMostThreads);
  return launch(retention_walk_kernel, dim3(static_cast<unsigned>(p.segments * p.gate_groups)), threads,
                shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
