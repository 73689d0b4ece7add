#pragma once

#include "../common/launch.cuh"
#include "../common/sequences.cuh"
#include "../common/workspace.cuh"
#include "new_state.cuh"
#include "retention.cuh"

#include <algorithm>

#include <cuda_pipeline_primitives.h>

namespace coda::kernels {

// The retention scan cut into segments of some chunks each, of those in which something leaves the ring (README.md). Sequence n
// owns the segments from row0 / segment_chunks + n on. A bank holds `capacity` entries in order of rank, 0 the best; free slots
// are entries too. Entries have identities: i >= 0 the i-th token that leaves the ring in this call, -1 a free slot, -2 - j what
// the sequence came with in slot num_sinks + j. Slots are counted without the sinks.
struct RetentionScan : BankScanForward {
  int capacity;  // exact slots that are no sinks
  int segment_chunks;
  int segment_tokens;  // evicted tokens of a segment
  int listed;          // of them the most that can be in a bank after it
  int64_t segments;
  Divisor by_chunk, by_segment, by_window;  // segments in chunks

  uint64_t* token_key;      // (segments, R, segment_tokens) descending
  int32_t* token_id;        // (segments, R, segment_tokens) their identities
  int2* token_stay;         // (segments, R, segment_tokens) until when each token stays, 0 if it never comes in, and the rank
                            // before the segment whose slot it takes; in order of position
  uint64_t* carried_key;    // (N, R, capacity) the bank that a sequence came with, descending
  int32_t* carried_id;      // (N, R, capacity)
  int32_t* carried_rank;    // (N, R, capacity) each slot's rank in it
  int32_t* bank_id;         // (segments, R, capacity) the bank before each segment
  int32_t* bank_until;      // (segments, R, capacity) until when its entries stay
  int32_t* rank_after;      // (segments, R, capacity) by rank before the segment: the rank after it of what is then in that slot
  int32_t* last_id;         // (N, R, capacity) the bank after the last segment, of sequences that have one
  int32_t* arrived;         // (segments, R) how many tokens came in
  size_t bytes;             // of these arrays
  void* block_workspace;    // behind them, for blocks that outgrow shared memory
  size_t block_bytes;       // what a block of the step that is launched needs
  int staged;               // segments whose rank_after is read at once
  int strip_rows;           // rows of the index that are gathered at once
  int copied;               // slots of the new state that a warp copies at once
  bool wide;                // see wide_rows

  explicit RetentionScan(const BankScanForward& p);
};

// One sequence in the scan. Tokens and chunk rows of a call fit into int, as flat sources do; positions do not.
struct SequencePlan {
  int number;       // n
  int token0;       // its first token, over all sequences
  int row0;         // its first chunk row
  int chunks;       // chunk rows in use
  int ring_slot;    // of the first new token
  int first_id;     // identity of the first token that the first chunk row would evict; negative where nothing leaves yet
  int lead;         // chunk rows before the first in which something leaves the ring
  int evicting;     // chunk rows in use from there on
  int64_t first;    // position of the first new token
  int64_t evicted;  // the first position that leaves the ring in this call

  __device__ static int row_start(const RetentionScan& p, int n) {
    return p.by_chunk.quotient(static_cast<int>(p.cu_seqlens[n])) + 2 * n;
  }
  __device__ static SequencePlan of(const RetentionScan& p, int n) {
    return of(p, n, static_cast<int>(p.cu_seqlens[n]), static_cast<int>(p.cu_seqlens[n + 1]), p.tokens_seen[n]);
  }
  __device__ static SequencePlan of(const RetentionScan& p, int n, int token0, int end, int64_t first) {
    SequencePlan plan;
    plan.number = n;
    plan.token0 = token0;
    plan.row0 = p.by_chunk.quotient(token0) + 2 * n;
    plan.first = first;
    const int64_t chunk = p.by_chunk.quotient(first);
    const int within = static_cast<int>(first - chunk * p.chunk), length = end - token0;
    plan.chunks = length > 0 ? p.by_chunk.quotient(within + length - 1) + 1 : 0;
    plan.ring_slot = static_cast<int>(first - p.by_window.quotient(first) * p.window);
    const int64_t begins = (chunk + (within > 0)) * p.chunk - p.window;
    plan.evicted = begins > 0 ? begins : 0;
    plan.first_id = static_cast<int>(chunk * p.chunk - p.window - plan.evicted);
    plan.lead = p.by_chunk.quotient(-plan.first_id);
    plan.evicting = max(plan.chunks - plan.lead, 0);
    return plan;
  }
  __device__ int segment0(const RetentionScan& p) const { return p.by_segment.quotient(row0) + number; }
  __device__ int segments(const RetentionScan& p) const { return p.by_segment.quotient(evicting + p.segment_chunks - 1); }
  __device__ int64_t state_row(const RetentionScan& p, int group) const {
    return static_cast<int64_t>(number) * p.gate_groups + group;
  }
  // The end of the positions that have left the ring when the i-th chunk reads the banks; `evicted` or less if none has.
  __device__ int64_t evicted_end(const RetentionScan& p, int i) const { return evicted + first_id + (i + 1) * p.chunk; }
  __device__ int64_t last_end(const RetentionScan& p) const { return chunks > 0 ? evicted_end(p, chunks - 1) : 0; }
  // Of a position that the ring holds or that is new.
  __device__ int source_of(const RetentionScan& p, int64_t position) const {
    const int ahead = static_cast<int>(position - first), slot = ring_slot + ahead;
    return ahead >= 0 ? p.window + p.exact_slots + ahead : slot < 0 ? slot + p.window : slot;
  }
  __device__ int source_of_id(const RetentionScan& p, int id) const {
    return id >= 0 ? source_of(p, evicted + id) : id == -1 ? -1 : p.window + p.num_sinks - 2 - id;
  }
  // The source of sink j when positions up to `end` have left the ring.
  __device__ int sink_source(const RetentionScan& p, int group, int j, int64_t end) const {
    if (j >= evicted && j < end) return source_of(p, j);
    return p.exact_pos[state_row(p, group) * p.exact_slots + j] < 0 ? -1 : p.window + j;
  }
};

// Some of the chunk rows of a sequence in which something leaves the ring.
struct SegmentPlan {
  SequencePlan sequence;
  int before;       // segments of the sequence before this one
  int begin, used;  // its first chunk row, within the sequence, and how many; none in segments that are not needed

  // One warp.
  __device__ static SegmentPlan of(const RetentionScan& p, int segment) {
    SegmentPlan plan;
    if (const int count = static_cast<int>(p.sequences); count < kWarp) {  // all that is known of them, at once
      const int mine = min(lane_id(), count), token = static_cast<int>(p.cu_seqlens[mine]);
      const int64_t seen = p.tokens_seen[min(mine, count - 1)];
      const int segment0 = p.by_segment.quotient(p.by_chunk.quotient(token) + 2 * mine) + mine;
      const int n = __popc(__ballot_sync(kAllLanes, lane_id() > 0 && lane_id() < count && segment0 <= segment));
      plan.sequence = SequencePlan::of(p, n, __shfl_sync(kAllLanes, token, n), __shfl_sync(kAllLanes, token, n + 1),
                                       __shfl_sync(kAllLanes, seen, n));
    } else {
      plan.sequence = SequencePlan::of(p, find_sequence_together(p.sequences, segment, [&](int n) {
        return p.by_segment.quotient(SequencePlan::row_start(p, n)) + n;
      }));
    }
    plan.before = segment - plan.sequence.segment0(p);
    plan.begin = plan.sequence.lead + plan.before * p.segment_chunks;
    plan.used = min(max(plan.sequence.chunks - plan.begin, 0), p.segment_chunks);
    return plan;
  }
  // For all threads of a block, which then sees it after a barrier.
  __device__ static void put(SegmentPlan* to, const RetentionScan& p, int segment) {
    if (warp_id() != 0) return;
    const auto plan = of(p, segment);
    if (lane_id() == 0) *to = plan;
  }
  // Identity of the first token that it evicts, and how many it does.
  __device__ int first_id(const RetentionScan& p) const { return sequence.first_id + begin * p.chunk; }
  __device__ int tokens(const RetentionScan& p) const { return used * p.chunk; }
  // Of the segments that are needed; without any, the first.
  __device__ bool last() const { return begin + used >= sequence.chunks; }
};

inline RetentionScan::RetentionScan(const BankScanForward& p)
    : BankScanForward(p), by_chunk(p.chunk), by_segment(1), by_window(p.window) {
  capacity = p.exact_slots - p.num_sinks;
  // About 16 segments to a sequence that has all tokens: each begins with a merge of the lists of those before it. Short ones
  // would list all of their tokens, long ones need much memory for a block.
  constexpr int64_t kSegments = 16, kLeastTokens = 256, kMostTokens = 1024;
  const int64_t target = std::min(std::max({p.tokens / kSegments, static_cast<int64_t>(capacity), kLeastTokens}), kMostTokens);
  segment_chunks = static_cast<int>(std::max<int64_t>(target / p.chunk, 1));
  segment_tokens = segment_chunks * p.chunk;
  by_segment = Divisor(segment_chunks);
  listed = capacity < segment_tokens ? capacity : segment_tokens;
  segments = tile_bound(p.chunk_rows, p.sequences, segment_chunks);
  const int64_t tokens = segments * p.gate_groups * segment_tokens, entries = segments * p.gate_groups * capacity,
                carried = p.sequences * p.gate_groups * capacity;
  Carver carver(p.workspace);
  token_key = carver.take<uint64_t>(tokens);
  token_id = carver.take<int32_t>(tokens);
  token_stay = carver.take<int2>(tokens);
  carried_key = carver.take<uint64_t>(carried);
  carried_id = carver.take<int32_t>(carried);
  carried_rank = carver.take<int32_t>(carried);
  bank_id = carver.take<int32_t>(entries);
  bank_until = carver.take<int32_t>(entries);
  rank_after = carver.take<int32_t>(entries);
  last_id = carver.take<int32_t>(carried);
  arrived = carver.take<int32_t>(segments * p.gate_groups);
  bytes = carver.used();
  block_workspace = carver.take<unsigned char>(0);
  block_bytes = 0;
  constexpr int kAtOnce = 16 * 1024 / sizeof(int32_t);
  staged = std::max(kAtOnce / std::max(capacity, 1), 1);
  strip_rows = std::min(std::max(kAtOnce / std::max(p.exact_slots, 1), 1), segment_chunks);
  copied = slots_of_warp(p);
  wide = false;
}

// The steps in their order, and what their blocks need where they outgrow shared memory. Each is launched early, but lets the
// next one start only by its end: blocks that wait crowd on the multiprocessors that are done first, and what they lose there is
// more than a launch takes. The last one lets its follower start, which may have work that does not wait for the scan.
size_t retention_tokens_workspace(const RetentionScan& p);
size_t retention_walk_workspace(const RetentionScan& p);
size_t retention_rows_workspace(const RetentionScan& p);
cudaError_t retention_tokens(const RetentionScan& p, DType dtype, cudaStream_t stream);
cudaError_t retention_walk(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_rows(const RetentionScan& p, DType dtype, cudaStream_t stream);

// Keys as integers in the same order. The free slots of a bank stand below every token, and below them tokens that are not
// offered, each with a key of its own from kNotOffered on; 0 stays unused, so that key - 1 is always something less.
constexpr uint64_t kNotOffered = 1, kFreeSlot = uint64_t{1} << 32;

__device__ inline uint64_t ordered_key(double key) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(add_rn(key, 0.0)));  // -0 equals 0
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// How many entries of a descending list are greater than key: by quarters, for few loads one after the other, and without a
// branch before them: it looks at an entry of an empty list as well. In few instructions, here and in what follows: a block runs
// through its code once, and fetching it takes time.
__device__ inline int count_above(const uint64_t* list, int count, uint64_t key) {
  int above = 0, left = count;
#pragma unroll 1
  while (left > 4) {
    const int quarter = left >> 2, at = above + quarter - 1;
    above += ((list[at] > key) + (list[at + quarter] > key) + (list[at + 2 * quarter] > key)) * quarter;
    left -= 3 * quarter;
  }
  int rest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) rest += (i < left) & (list[max(min(above + i, count - 1), 0)] > key);
  return above + rest;
}

// Entries [place, place + kInRow) of two descending lists together, with identities; between equal keys those of the second come
// first, and what lies behind both ends is anything. One search for several entries.
template <int kInRow>
__device__ inline void merge_places(const uint64_t* a, const int* a_id, int a_count, const uint64_t* b, const int* b_id,
                                    int b_count, int place, uint64_t (&key)[kInRow], int (&id)[kInRow]) {
  int low = max(place - b_count, 0), high = min(place, a_count);  // how many of those before come from the first list
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) >> 1;
    const bool more = a[middle] > b[place - 1 - middle];
    low = more ? middle + 1 : low;
    high = more ? high : middle;
  }
  int i = low, j = place - low, from[kInRow];
  uint64_t first = i < a_count ? a[i] : 0, second = j < b_count ? b[j] : 0;
#pragma unroll
  for (int k = 0; k < kInRow; ++k) {
    const bool from_first = first > second;
    key[k] = from_first ? first : second;
    from[k] = from_first ? i : -1 - j;
    i += from_first;
    j += !from_first;
    const uint64_t next = (from_first ? i < a_count : j < b_count) ? *(from_first ? a + i : b + j) : 0;
    first = from_first ? next : first;
    second = from_first ? second : next;
  }
#pragma unroll
  for (int k = 0; k < kInRow; ++k) id[k] = from[k] < 0 ? b_id[min(-1 - from[k], b_count - 1)] : a_id[from[k]];
}

// Calls body with a block's memory, twice in code: so that where it is shared, the compiler knows.
template <class Body>
__device__ inline void with_block_memory(const RetentionScan& p, unsigned char* shared, Body body) {
  if (p.block_bytes <= kSharedLimit) {
    Carver carver(shared);
    body(carver);
  } else {
    Carver carver(static_cast<unsigned char*>(p.block_workspace) + static_cast<size_t>(blockIdx.x) * p.block_bytes);
    body(carver);
  }
}

// An entry on its way into a block's memory, of 4 or 8 bytes; there once the block has called wait_brought.
template <class T>
__device__ inline void bring(const RetentionScan& p, T* to, const T* from) {
  if (p.block_bytes <= kSharedLimit) {
    __pipeline_memcpy_async(to, from, sizeof(T));
  } else {
    *to = *from;
  }
}
__device__ inline void wait_brought() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

}  // namespace coda::kernels
