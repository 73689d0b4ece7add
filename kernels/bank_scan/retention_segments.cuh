#pragma once

#include "../common/launch.cuh"
#include "../common/sequences.cuh"
#include "../common/workspace.cuh"
#include "retention.cuh"
#include "scan_view.cuh"

namespace coda::kernels {

// The retention scan cut into segments of some chunks each (README.md). Sequence n owns the segments from row0 / segment_chunks + n
// on, and the banks from row0 / segment_chunks + 2 n on, one before each of its segments and one after the last. A bank holds
// `capacity` entries in order of rank, 0 the best; free slots are entries too. Entries have identities: i >= 0 the i-th token that
// leaves the ring in this call, -1 a free slot, -2 - j what the sequence came with in slot num_sinks + j.
struct RetentionScan : BankScanForward {
  int capacity;  // exact slots that are no sinks
  int segment_chunks;
  int segment_tokens;  // evicted tokens of a segment
  int listed;          // of them the most that can be in a bank after it
  int64_t segments, banks;

  uint64_t* token_key;   // (segments, R, segment_tokens) descending
  int32_t* token;        // (segments, R, segment_tokens) which of the segment's tokens that is
  int2* token_stay;      // (segments, R, segment_tokens) in order of position: until when a token stays, 0 if it never comes in, and the rank before the segment whose slot it takes
  uint64_t* bank_key;    // (banks, R, capacity) descending
  int32_t* bank_id;      // (banks, R, capacity)
  int32_t* bank_slot;    // (banks, R, capacity) each rank's slot, without the sinks
  int32_t* bank_until;   // (segments, R, capacity) until when an entry of the bank before the segment stays
  int32_t* rank_after;   // (segments, R, capacity) by rank before the segment: the rank after it of what is then in that slot
  size_t bytes;          // of these arrays
  void* block_workspace;  // behind them, for blocks that outgrow shared memory
  size_t block_bytes;     // what a block of the step that is launched needs

  explicit RetentionScan(const BankScanForward& p) : BankScanForward(p) {
    capacity = p.exact_slots - p.num_sinks;
    // Segments of 256 tokens: long enough that few banks follow one another, short enough to fill a GPU from 8192 tokens on.
    segment_chunks = p.chunk < 256 ? 256 / p.chunk : 1;
    segment_tokens = segment_chunks * p.chunk;
    listed = capacity < segment_tokens ? capacity : segment_tokens;
    segments = tile_bound(p.chunk_rows, p.sequences, segment_chunks);
    banks = segments + p.sequences;
    const int64_t tokens = segments * p.gate_groups * segment_tokens, entries = banks * p.gate_groups * capacity;
    Carver carver(p.workspace);
    token_key = carver.take<uint64_t>(tokens);
    token = carver.take<int32_t>(tokens);
    token_stay = carver.take<int2>(tokens);
    bank_key = carver.take<uint64_t>(entries);
    bank_id = carver.take<int32_t>(entries);
    bank_slot = carver.take<int32_t>(entries);
    bank_until = carver.take<int32_t>(entries);
    rank_after = carver.take<int32_t>(entries);
    bytes = carver.used();
    block_workspace = carver.take<unsigned char>(0);
    block_bytes = 0;
  }
};

// Bytes of a block, and the steps in their order.
size_t retention_tokens_block(const RetentionScan& p);
size_t retention_banks_block(const RetentionScan& p);
size_t retention_walk_block(const RetentionScan& p);
cudaError_t retention_tokens(const RetentionScan& p, DType dtype, cudaStream_t stream);
cudaError_t retention_banks(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_walk(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_slots(const RetentionScan& p, cudaStream_t stream);
cudaError_t retention_rows(const RetentionScan& p, cudaStream_t stream);

// Keys as integers in the same order. The free slots of a bank stand below every token, and below them tokens that are not offered;
// 0 stays unused, so that key - 1 is always something less.
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

// One sequence and gate group as the retention scan sees it.
template <class A>
struct RetentionView : ScanView<A> {
  const RetentionScan& scan;
  int group;
  int64_t evicted;  // the first position that leaves the ring in this call

  __device__ RetentionView(const RetentionScan& params, int64_t sequence, int group_)
      : ScanView<A>(params, sequence), scan(params), group(group_) {
    const int64_t from = this->span.first > params.window ? this->span.first : params.window;
    evicted = (from + params.chunk - 1) / params.chunk * params.chunk - params.window;
  }

  __device__ int64_t segment_row(int64_t s) const {
    return (this->span.row0 / scan.segment_chunks + this->n + s) * scan.gate_groups + group;
  }
  __device__ int64_t bank_row(int64_t s) const { return segment_row(s) + this->n * scan.gate_groups; }
  __device__ int64_t segment_count() const {
    return (this->span.chunks + scan.segment_chunks - 1) / scan.segment_chunks;
  }
  __device__ int64_t state_exact() const { return (this->n * scan.gate_groups + group) * scan.exact_slots; }
  // The end of the positions that have left the ring when the i-th chunk reads the banks; `evicted` or less if none has.
  __device__ int64_t evicted_end(int64_t i) const {
    return this->span.chunk_start(i, scan.chunk) - scan.window + scan.chunk;
  }
  // The identity of the first token of the segment that begins with chunk i; negative where nothing leaves yet.
  __device__ int first_id(int64_t i) const { return static_cast<int>(evicted_end(i) - scan.chunk - evicted); }
  __device__ int source_of_id(int id) const {
    return id >= 0 ? this->source_of(evicted + id) : id == -1 ? -1 : scan.window + scan.num_sinks - 2 - id;
  }
  // The source of sink j when positions up to `end` have left the ring.
  __device__ int sink_source(int j, int64_t end) const {
    if (j >= evicted && j < end) return this->source_of(j);
    return scan.exact_pos[state_exact() + j] < 0 ? -1 : scan.window + j;
  }
};

// One segment of a sequence and gate group; `item` counts segments and, within them, groups.
template <class A>
struct RetentionSegment {
  const RetentionScan& p;
  Tile tile;
  RetentionView<A> view;

  __device__ RetentionSegment(const RetentionScan& params, int64_t item)
      : p(params), tile(find_tile(params.sequences, item / params.gate_groups, params.segment_chunks,
                                  [&](int64_t n) { return row_start(params, n); })),
        view(params, tile.sequence, static_cast<int>(item % params.gate_groups)) {}

  __device__ static int64_t row_start(const RetentionScan& p, int64_t n) { return p.cu_seqlens[n] / p.chunk + 2 * n; }

  // Its rows: those that the sequence has, and those that it uses.
  __device__ int rows() const {
    const int64_t n = tile.sequence, end = n + 1 < p.sequences ? row_start(p, n + 1) : p.chunk_rows;
    return clamped(end - view.span.row0);
  }
  __device__ int used_rows() const { return clamped(view.span.chunks); }
  __device__ int64_t number() const { return tile.begin / p.segment_chunks; }

 private:
  __device__ int clamped(int64_t end) const {
    const int64_t left = end - tile.begin;
    return static_cast<int>(left < 0 ? 0 : left < p.segment_chunks ? left : p.segment_chunks);
  }
};

}  // namespace coda::kernels
