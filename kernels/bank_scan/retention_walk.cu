#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kInRow = 2;  // places of a thread in a merge

// A set of small integers that counts its members below any number.
struct RankedSet {
  unsigned* member;  // (words) bits
  int* before;       // (words + 1) members in earlier words

  __device__ int below(int i) const { return before[i / 32] + __popc(member[i / 32] & ((1u << i % 32) - 1)); }

  // One warp; the bits are set.
  __device__ void count(int words) const {
    int total = 0;
#pragma unroll 1
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

constexpr int kListsAtOnce = 16;

__host__ __device__ inline int words_of(int count) { return (count + 31) / 32; }

// The bank before the segment, in one of two places, and the segment's tokens in order of key.
struct SegmentMemory {
  uint64_t* bank;  // (2, capacity)
  int* bank_id;    // (2, capacity)
  uint64_t* key;   // (segment_tokens)
  int* token;      // (segment_tokens) identities; then which of the segment's tokens that is

  __host__ __device__ SegmentMemory(Carver& carver, int capacity, int tokens)
      : bank(carver.take<uint64_t>(2 * capacity)), bank_id(carver.take<int>(2 * capacity)), key(carver.take<uint64_t>(tokens)),
        token(carver.take<int>(tokens)) {}
};

// Entries are the ranks of the bank before the segment, then its tokens in order of key as far as they are no worse than all of
// that bank: others never come in. Their places are those in the order of all keys together.
struct WalkMemory : SegmentMemory {
  int stride;        // of sets
  int* place;        // (entries)
  int* born;         // (entries), by place: the chunk that brings it, 0 for the bank
  unsigned* member;  // (segment_chunks, stride) of the sets: places that the bank or the chunks up to this one bring
  int* before;       // (segment_chunks, stride)
  int2* stay;        // (entries) the first chunk in which an entry is no longer held, 0 for tokens that never were, and its last
                     // rank before
  unsigned* arrival_member;  // (words) of the set of tokens that come in
  int* arrival_before;       // (words + 1)
  int* leaver;               // (segment_tokens) the entry whose slot the i-th arrival takes; where place was

  __host__ __device__ WalkMemory(Carver& carver, int capacity, int tokens, int chunks)
      : SegmentMemory(carver, capacity, tokens), stride((words_of(capacity + tokens) + 1) | 1),
        place(carver.take<int>(capacity + tokens)), born(carver.take<int>(capacity + tokens)),
        member(carver.take<unsigned>(chunks * stride)), before(carver.take<int>(chunks * stride)),
        stay(carver.take<int2>(capacity + tokens)), arrival_member(carver.take<unsigned>(words_of(tokens) + 1)),
        arrival_before(carver.take<int>(words_of(tokens) + 1)), leaver(place) {}

  // What has come when chunk b of the segment reads the bank.
  __device__ RankedSet come(int b) const { return {member + b * stride, before + b * stride}; }
  __device__ RankedSet arrivals() const { return {arrival_member, arrival_before}; }
};

// Lists of the best tokens of segments, two rows of them; where WalkMemory has its own arrays, which come later.
struct MergeMemory : SegmentMemory {
  int at_once;  // lists of a row, several only where each is as long as a bank
  uint64_t* list;  // (2, at_once, listed)
  int* id;         // (2, at_once, listed)

  __host__ __device__ MergeMemory(Carver& carver, int capacity, int tokens, int listed)
      : SegmentMemory(carver, capacity, tokens), at_once(listed == capacity ? kListsAtOnce : 1),
        list(carver.take<uint64_t>(2 * at_once * listed)), id(carver.take<int>(2 * at_once * listed)) {}
};

// Merges each two neighbours of the row of lists at `from` into the best `length` of both, at `to`, the last one alone where
// their number is odd. Between equal keys what comes from the later list wins: the later token.
__device__ inline void merge_neighbours(const MergeMemory& work, int from, int to, int lists, int length) {
  const int parts = words_of((length + kInRow - 1) / kInRow);
  int list = 0, part = warp_id();
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (; part >= parts; part -= parts) list += 2;
    if (list >= lists) return;
    const int left = from + list * length, right = left + length, at = to + (list >> 1) * length;
    const int place = (part * kWarp + lane_id()) * kInRow;
    if (place < length) {
      uint64_t keys[kInRow];
      int ids[kInRow];
      merge_places(work.list + left, work.id + left, length, work.list + right, work.id + right, list + 1 < lists ? length : 0,
                   place, keys, ids);
#pragma unroll
      for (int k = 0; k < kInRow; ++k) {
        if (place + k >= length) break;
        work.list[at + place + k] = keys[k];
        work.id[at + place + k] = ids[k];
      }
    }
    part += warp_count();
  }
}

// Finds the bank before the segment: the best of what the sequence came with and of the lists of all segments before. Brings the
// segment's own tokens meanwhile. Returns where in work.bank it is.
__device__ inline int find_bank(const RetentionScan& p, const SegmentPlan& plan, int group, int64_t row,
                                const MergeMemory& work) {
  const int capacity = p.capacity, tokens = p.segment_tokens, listed = p.listed, before = plan.before;
  const int64_t carried = plan.sequence.state_row(p, group) * capacity;
#pragma unroll 1
  for (int e = threadIdx.x; e < capacity; e += blockDim.x) {
    bring(p, work.bank + e, p.carried_key + carried + e);
    bring(p, work.bank_id + e, p.carried_id + carried + e);
  }
  int now = 0;
#pragma unroll 1
  for (int s = 0; s < before; s += work.at_once) {
    int count = listed > 0 ? min(work.at_once, before - s) : 0;
#pragma unroll 1
    for (int l = warp_id(); l < count; l += warp_count()) {
      const int64_t from = (row - static_cast<int64_t>(before - s - l) * p.gate_groups) * tokens;
#pragma unroll 1
      for (int i = lane_id(); i < listed; i += kWarp) {
        bring(p, work.list + l * listed + i, p.token_key + from + i);
        bring(p, work.id + l * listed + i, p.token_id + from + i);
      }
    }
    wait_brought();
    int from = 0, to = work.at_once * listed;
#pragma unroll 1
    for (; count > 1; count = (count + 1) / 2) {
      merge_neighbours(work, from, to, count, listed);
      __syncthreads();
      from = work.at_once * listed - from;
      to = work.at_once * listed - to;
    }
    const int next = capacity - now;
#pragma unroll 1
    for (int place = kInRow * static_cast<int>(threadIdx.x); place < capacity; place += kInRow * static_cast<int>(blockDim.x)) {
      uint64_t keys[kInRow];
      int ids[kInRow];
      merge_places(work.bank + now, work.bank_id + now, capacity, work.list + from, work.id + from, listed, place, keys, ids);
#pragma unroll
      for (int k = 0; k < kInRow; ++k) {
        if (place + k >= capacity) break;
        work.bank[next + place + k] = keys[k];
        work.bank_id[next + place + k] = ids[k];
      }
    }
    __syncthreads();
    now = next;
  }
  if (before == 0) wait_brought();
  return now;
}

// Finds what comes and goes in one segment, given the bank before it, and which slot each arrival takes. The memory is the
// same twice, as merges need it and as the walk does. The whole block.
__device__ inline void walk_segment(const RetentionScan& p, const SegmentPlan& plan, int group, int64_t row,
                                    const MergeMemory& merge, const WalkMemory& work) {
  const int capacity = p.capacity, chunk = p.chunk, chunks = plan.used, tokens = plan.tokens(p), first_id = plan.first_id(p);
  int2* const token_stay = p.token_stay + row * p.segment_tokens;
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {  // there once find_bank has been called
    bring(p, work.key + i, p.token_key + row * p.segment_tokens + i);
    bring(p, work.token + i, p.token_id + row * p.segment_tokens + i);
  }
  const int now = find_bank(p, plan, group, row, merge);
  const uint64_t* bank = work.bank + now;
  const int* bank_id = work.bank_id + now;
  const uint64_t worst = capacity > 0 ? bank[capacity - 1] : ~uint64_t{0};
  // Between equal keys the later token comes first.
#pragma unroll 1
  for (int e = threadIdx.x; e < capacity + tokens; e += blockDim.x) {
    const int i = e - capacity;
    const int token = i < 0 ? 0 : work.token[i] -= first_id;
    if (i >= 0 && work.key[i] < worst) {
      token_stay[token] = {0, 0};
    } else {
      const int place = i < 0 ? e + count_above(work.key, tokens, bank[e] - 1) : i + count_above(bank, capacity, work.key[i]);
      work.place[e] = place;
      work.born[place] = i < 0 ? 0 : p.by_chunk.quotient(token);
    }
  }
#pragma unroll 1
  for (int w = threadIdx.x; w <= words_of(tokens); w += blockDim.x) work.arrival_member[w] = 0;
  __syncthreads();
  const int entries = capacity > 0 ? work.place[capacity - 1] + 1 : 0, words = words_of(entries);
#pragma unroll 1
  for (int w = warp_id(); w < words; w += warp_count()) {
    // First what each chunk brings, then what has come until then.
    unsigned* const member = work.member + w;
    const int place = w * kWarp + lane_id(), born = place < entries ? work.born[place] : chunks;
    const unsigned first = __ballot_sync(kAllLanes, born == 0);
#pragma unroll 1
    for (int b = lane_id(); b < chunks; b += kWarp) member[b * work.stride] = b == 0 ? first : 0;
    __syncwarp();
    if (born > 0 && born < chunks) atomicOr(member + born * work.stride, 1u << lane_id());
    __syncwarp();
    unsigned come = 0;
#pragma unroll 1
    for (int base = 0; base < chunks; base += kWarp) {
      const int b = base + lane_id();
      unsigned bits = b < chunks ? member[b * work.stride] : 0;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned other = __shfl_up_sync(kAllLanes, bits, offset);
        if (lane_id() >= offset) bits |= other;
      }
      bits |= come;
      if (b < chunks) member[b * work.stride] = bits;
      come = __shfl_sync(kAllLanes, bits, kWarp - 1);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int b = warp_id(); b < chunks; b += warp_count()) work.come(b).count(words);
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const int i = e - capacity, token = i < 0 ? 0 : work.token[i], place = work.place[e], born = p.by_chunk.quotient(token);
    int low = born;  // the first chunk from then on that finds the bank full with better ones
#pragma unroll 1
    for (int step = 1 << (31 - __clz(chunks)); step > 0; step /= 2) {
      const int next = low + step;
      const bool held = work.come(min(next, chunks) - 1).below(place) < capacity;
      low = (next <= chunks) & held ? next : low;
    }
    const bool arrives = i >= 0 && low > born;
    if (arrives) atomicOr(work.arrival_member + token / 32, 1u << token % 32);
    work.stay[e] = {i < 0 || arrives ? low : 0, low > 0 ? work.come(low - 1).below(place) : e};
  }
  __syncthreads();
  const auto arrivals = work.arrivals();
  if (warp_id() == 0) arrivals.count(words_of(tokens));
  __syncthreads();
  // The k-th arrival of a chunk takes the slot of the k-th from the end of the bank before it. Then so does the i-th arrival of
  // the segment, if what leaves is numbered on from chunk to chunk.
#pragma unroll 1
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const int2 stay = work.stay[e];
    if (stay.x < chunks && (e < capacity || stay.x > 0)) {
      work.leaver[arrivals.below(stay.x * chunk) + capacity - 1 - stay.y] = e;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const int2 stay = work.stay[e];
    const int i = e - capacity;
    int held = e;
    while (stay.x > 0 && held >= capacity) held = work.leaver[arrivals.below(work.token[held - capacity])];
    if (i < 0) {
      p.bank_id[row * capacity + e] = bank_id[e];
      p.bank_until[row * capacity + e] = stay.x;
    } else {
      token_stay[work.token[i]] = {stay.x, held};
    }
    if (stay.x < chunks) continue;
    p.rank_after[row * capacity + held] = stay.y;
    if (plan.last()) {
      p.last_id[plan.sequence.state_row(p, group) * capacity + stay.y] =
          i < 0 ? bank_id[e] : first_id + work.token[i];
    }
  }
  if (threadIdx.x == 0) p.arrived[row] = arrivals.before[words_of(tokens)];
}

inline size_t walk_bytes(const RetentionScan& p) {
  Carver walk(nullptr), merge(nullptr);
  WalkMemory(walk, p.capacity, p.segment_tokens, p.segment_chunks);
  MergeMemory(merge, p.capacity, p.segment_tokens, p.listed);
  return std::max(walk.used(), merge.used());
}

// A block for each segment and gate group.
__global__ void __launch_bounds__(kThreads, 2) retention_walk_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ SegmentPlan plan;
  const int block = static_cast<int>(blockIdx.x);
  wait_for_stream();
  SegmentPlan::put(&plan, p, block / p.gate_groups);
  __syncthreads();
  if (plan.used == 0) return;
  with_block_memory(p, shared, [&](Carver& carver) {
    Carver again = carver;
    const MergeMemory merge(again, p.capacity, p.segment_tokens, p.listed);
    const WalkMemory work(carver, p.capacity, p.segment_tokens, p.segment_chunks);
    walk_segment(p, plan, block % p.gate_groups, block, merge, work);
  });
}

}  // namespace

size_t retention_walk_workspace(const RetentionScan& p) { return workspace_part(walk_bytes(p), p.segments * p.gate_groups); }

cudaError_t retention_walk(const RetentionScan& scan, cudaStream_t stream) {
  auto p = scan;
  p.block_bytes = walk_bytes(scan);
  const dim3 grid(static_cast<unsigned>(p.segments * p.gate_groups));
  return launch_early(retention_walk_kernel, grid, kThreads, shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
