#pragma once

#include "../common/launch.cuh"
#include "../common/sequences.cuh"
#include "../common/workspace.cuh"
#include "retention.cuh"
#include "scan_view.cuh"

namespace coda::kernels {

constexpr int kSegmentTokens = 512;

struct SegmentPlan;

// The retention scan cut into segments of some chunks each (README.md). Sequence n owns the segments from
// row0 / segment_chunks + n on, and the banks from row0 / segment_chunks + 2 n on, one before each of its segments and one after
// the last. A bank holds `capacity` entries in order of rank, 0 the best; free slots are entries too. Entries have identities:
// i >= 0 the i-th token that leaves the ring in this call, -1 a free slot, -2 - j what the sequence came with in slot num_sinks + j.
struct RetentionScan : BankScanForward {
  int capacity;  // exact slots that are no sinks
  int segment_chunks;
  int segment_tokens;  // evicted tokens of a segment
  int listed;          // of them the most that can be in a bank after it
  int64_t segments, banks;

  SegmentPlan* plan;      // (segments)
  uint64_t* token_key;    // (segments, R, segment_tokens) descending
  int32_t* token;         // (segments, R, segment_tokens) which of the segment's tokens that is
  int2* token_stay;       // (segments, R, segment_tokens) until when each token stays, 0 if it never comes in, and the rank before
                          // the segment whose slot it takes; in order of position
  uint64_t* bank_key;     // (banks, R, capacity) descending
  int32_t* bank_id;       // (banks, R, capacity)
  int32_t* bank_slot;     // (banks, R, capacity) each rank's slot, without the sinks
  int32_t* bank_rank;     // (banks, R, capacity) each slot's rank
  int32_t* bank_until;    // (segments, R, capacity) until when an entry of the bank before the segment stays
  int32_t* rank_after;    // (segments, R, capacity) by rank before the segment: the rank after it of what is then in that slot
  size_t bytes;           // of these arrays
  void* block_workspace;  // behind them, for blocks that outgrow shared memory
  size_t block_bytes;     // what a block of the step that is launched needs

  explicit RetentionScan(const BankScanForward& p);
};

// One sequence in the scan. Tokens and chunk rows of a call fit into int, as flat sources do; positions do not.
struct SequencePlan {
  int number;       // n
  int token0;       // its first token, over all sequences
  int row0;         // its first chunk row
  int chunks;       // chunk rows in use
  int first_id;     // identity of the first token that the first chunk row would evict; negative where nothing leaves yet
  int64_t first;    // position of the first new token
  int64_t evicted;  // the first position that leaves the ring in this call

  __device__ static int row_start(const RetentionScan& p, int n) {
    return static_cast<int>(p.cu_seqlens[n]) / p.chunk + 2 * n;
  }
  __device__ static SequencePlan of(const RetentionScan& p, int n) {
    SequencePlan plan;
    plan.number = n;
    plan.token0 = static_cast<int>(p.cu_seqlens[n]);
    plan.row0 = plan.token0 / p.chunk + 2 * n;
    const int length = static_cast<int>(p.cu_seqlens[n + 1]) - plan.token0;
    plan.first = p.tokens_seen[n];
    const int64_t chunk = plan.first / p.chunk;
    const int within = static_cast<int>(plan.first - chunk * p.chunk);
    plan.chunks = length > 0 ? (within + length - 1) / p.chunk + 1 : 0;
    const int64_t begins = (chunk + (within > 0)) * p.chunk - p.window;
    plan.evicted = begins > 0 ? begins : 0;
    plan.first_id = static_cast<int>(chunk * p.chunk - p.window - plan.evicted);
    return plan;
  }
  __device__ int segment0(const RetentionScan& p) const { return row0 / p.segment_chunks + number; }
  __device__ int segments(const RetentionScan& p) const { return (chunks + p.segment_chunks - 1) / p.segment_chunks; }
  __device__ int64_t state_row(const RetentionScan& p, int group) const {
    return static_cast<int64_t>(number) * p.gate_groups + group;
  }
  // The end of the positions that have left the ring when the i-th chunk reads the banks; `evicted` or less if none has.
  __device__ int64_t evicted_end(const RetentionScan& p, int i) const { return evicted + first_id + (i + 1) * p.chunk; }
  __device__ int source_of(const RetentionScan& p, int64_t position) const {
    return static_cast<int>(position < first ? position % p.window : p.window + p.exact_slots + position - first);
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

struct SegmentPlan {
  SequencePlan sequence;
  int begin;       // its first chunk row, within the sequence
  int rows, used;  // how many the sequence has, and uses, from there

  // One warp.
  __device__ static SegmentPlan of(const RetentionScan& p, int segment) {
    // Every lane looks at one sequence: a binary search would wait for memory again and again.
    int n = 0;
    for (int left = static_cast<int>(p.sequences) - 1; left > 0;) {
      const int step = (left + kWarp - 1) / kWarp, ahead = (lane_id() + 1) * step;
      const bool passed = ahead <= left && SequencePlan::row_start(p, n + ahead) / p.segment_chunks + n + ahead <= segment;
      const int by = __popc(__ballot_sync(kAllLanes, passed)) * step;
      n += by;
      left = min(left - by, step - 1);
    }
    SegmentPlan plan;
    plan.sequence = SequencePlan::of(p, n);
    plan.begin = (segment - plan.sequence.segment0(p)) * p.segment_chunks;
    const int end = n + 1 < p.sequences ? SequencePlan::row_start(p, n + 1) : static_cast<int>(p.chunk_rows);
    plan.rows = min(max(end - plan.sequence.row0 - plan.begin, 0), p.segment_chunks);
    plan.used = min(max(plan.sequence.chunks - plan.begin, 0), p.segment_chunks);
    return plan;
  }
};

inline RetentionScan::RetentionScan(const BankScanForward& p) : BankScanForward(p) {
  capacity = p.exact_slots - p.num_sinks;
  // Segments of 512 tokens: long enough that few banks follow one another, short enough to fill a GPU from 8192 tokens on.
  segment_chunks = p.chunk < kSegmentTokens ? kSegmentTokens / p.chunk : 1;
  segment_tokens = segment_chunks * p.chunk;
  listed = capacity < segment_tokens ? capacity : segment_tokens;
  segments = tile_bound(p.chunk_rows, p.sequences, segment_chunks);
  banks = segments + p.sequences;
  const int64_t tokens = segments * p.gate_groups * segment_tokens, entries = banks * p.gate_groups * capacity;
  Carver carver(p.workspace);
  plan = carver.take<SegmentPlan>(segments);
  token_key = carver.take<uint64_t>(tokens);
  token = carver.take<int32_t>(tokens);
  token_stay = carver.take<int2>(tokens);
  bank_key = carver.take<uint64_t>(entries);
  bank_id = carver.take<int32_t>(entries);
  bank_slot = carver.take<int32_t>(entries);
  bank_rank = carver.take<int32_t>(entries);
  bank_until = carver.take<int32_t>(entries);
  rank_after = carver.take<int32_t>(entries);
  bytes = carver.used();
  block_workspace = carver.take<unsigned char>(0);
  block_bytes = 0;
}

// Bytes of a block, and the steps in their order.
size_t retention_tokens_block(const RetentionScan& p);
size_t retention_banks_block(const RetentionScan& p);
size_t retention_walk_block(const RetentionScan& p);
cudaError_t retention_tokens(const RetentionScan& p, DType dtype, cudaStream_t stream);
cudaError_t retention_banks(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_walk(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_slots(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_rows(const RetentionScan& p, cudaStream_t stream);

// Keys as integers in the same order. The free slots of a bank stand below every token, and below them tokens that are not
// offered; 0 stays unused, so that key - 1 is always something less.
constexpr uint64_t kNotOffered = 1, kFreeSlot = 2;

__device__ inline uint64_t ordered_key(double key) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(add_rn(key, 0.0)));  // -0 equals 0
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// How many entries of a descending list are greater than key. No branches, and as many steps for every thread.
__device__ inline int count_above(const uint64_t* list, int count, uint64_t key) {
  if (count == 0) return 0;
  const uint64_t* from = list;
  while (count > 1) {
    const int half = count / 2;
    from = from[half - 1] > key ? from + half : from;
    count -= half;
  }
  return static_cast<int>(from - list) + (*from > key);
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

}  // namespace coda::kernels
