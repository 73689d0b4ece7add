#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct RowsMemory {
  int32_t* staged;   // (staged, capacity), until the slots have been followed
  int32_t* slot_of;  // (capacity) by rank before the segment
  int32_t* id;       // (capacity) likewise, as the next two from the step before
  int32_t* until;    // (capacity)
  int2* stay;        // (segment_tokens)
  int32_t* strip;    // (strip_rows, exact_slots), from then on
  double* inv_freq;  // (D/2)

  __host__ __device__ RowsMemory(Carver& carver, const RetentionScan& p)
      : staged(carver.take<int32_t>(std::max(p.staged * p.capacity, p.strip_rows * p.exact_slots))),
        slot_of(carver.take<int32_t>(p.capacity)), id(carver.take<int32_t>(p.capacity)), until(carver.take<int32_t>(p.capacity)),
        stay(carver.take<int2>(p.segment_tokens)), strip(staged), inv_freq(carver.take<double>(p.dim / 2)) {}
};

// Follows the slots [begin, end), of which those below 0 are none, through the first `count` segments of a sequence, which start
// at `segment`: calls found(slot, rank) with the rank that what is in a slot has then. The whole block; ends with a barrier.
template <class Found>
__device__ inline void follow_slots(const RetentionScan& p, int32_t* staged, int64_t state, int64_t segment, int count, int begin,
                                    int end, Found found) {
  const int capacity = p.capacity;
  for (; begin < end; begin += kThreads) {
    const int slot = begin + static_cast<int>(threadIdx.x);
    const bool mine = slot >= 0 && slot < end;
    int rank = mine ? p.carried_rank[state * capacity + slot] : 0;
#pragma unroll 1
    for (int s = 0; s < count; s += p.staged) {
      const int now = min(p.staged, count - s);
#pragma unroll 1
      for (int i = warp_id(); i < now; i += kWarps) {
        const int64_t from = (segment + static_cast<int64_t>(s + i) * p.gate_groups) * capacity;
#pragma unroll 1
        for (int e = lane_id(); e < capacity; e += kWarp) bring(p, staged + i * capacity + e, p.rank_after + from + e);
      }
      wait_brought();
#pragma unroll 1
      for (int i = 0; mine && i < now; ++i) rank = staged[i * capacity + rank];
      __syncthreads();
    }
    if (mine) found(slot, rank);
  }
  __syncthreads();
}

constexpr int kAsBefore = -2;  // in a strip: what the row before has

// The rows of one segment; those before anything leaves the ring go with a sequence's first segment, those that no chunk uses
// with the last. The whole block.
__device__ inline void write_rows(const RetentionScan& p, const SegmentPlan& plan, int group, int64_t row,
                                  const RowsMemory& work) {
  const auto& sequence = plan.sequence;
  const int used = plan.used, sinks = p.num_sinks, slots = p.exact_slots, capacity = p.capacity, tokens = plan.tokens(p);
  const auto index_row = [&](int i) {
    return p.index + (static_cast<int64_t>(sequence.row0 + i) * p.gate_groups + group) * slots;
  };
#pragma unroll 1
  for (int e = threadIdx.x; e < (used > 0 ? capacity : 0); e += kThreads) {
    bring(p, work.id + e, p.bank_id + row * capacity + e);
    bring(p, work.until + e, p.bank_until + row * capacity + e);
  }
#pragma unroll 1
  for (int c = threadIdx.x; c < tokens; c += kThreads) bring(p, work.stay + c, p.token_stay + row * p.segment_tokens + c);
  if (plan.before == 0) {
    const int64_t* positions = p.exact_pos + sequence.state_row(p, group) * slots;
    const int idle = min(sequence.lead, sequence.chunks);
#pragma unroll 1
    for (int j = threadIdx.x; j < slots; j += kThreads) {
      const int carried = positions[j] < 0 ? -1 : p.window + j;
#pragma unroll 1
      for (int i = 0; i < idle; ++i) index_row(i)[j] = carried;
    }
  }
  if (plan.last() && (used > 0 || plan.before == 0)) {
    const int next = sequence.number + 1;
    const int rows = (next < p.sequences ? SequencePlan::row_start(p, next) : static_cast<int>(p.chunk_rows)) - sequence.row0;
#pragma unroll 1
    for (int i = sequence.chunks + warp_id(); i < rows; i += kWarps) {
#pragma unroll 1
      for (int j = lane_id(); j < slots; j += kWarp) index_row(i)[j] = -1;
    }
  }
  if (used == 0) return;
  if (plan.before == 0 || capacity == 0) wait_brought();  // else follow_slots does
  follow_slots(p, work.staged, sequence.state_row(p, group), row - static_cast<int64_t>(plan.before) * p.gate_groups, plan.before,
               0, capacity, [&](int slot, int rank) { work.slot_of[rank] = slot; });
  // What is in a slot, and for how long, gives no order in which to write whole rows. So each source goes into a strip of rows in
  // shared memory, where it comes in, and whoever writes a slot's column takes it along.
#pragma unroll 1
  for (int b0 = 0; b0 < used; b0 += p.strip_rows) {
    const int end = min(b0 + p.strip_rows, used);
    const auto hold = [&](int slot, int id, int from, int until) {
      const int b = max(from, b0);
      if (b < min(until, end)) work.strip[(b - b0) * slots + sinks + slot] = sequence.source_of_id(p, id);
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - b0) * slots; i += kThreads) work.strip[i] = kAsBefore;
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < capacity; e += kThreads) hold(work.slot_of[e], work.id[e], 0, work.until[e]);
#pragma unroll 1
    for (int c = threadIdx.x; c < tokens; c += kThreads) {
      const int2 stay = work.stay[c];
      if (stay.x > 0) hold(work.slot_of[stay.y], plan.first_id(p) + c, p.by_chunk.quotient(c), stay.x);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - b0) * sinks; i += kThreads) {
      const int b = i / sinks, j = i - b * sinks;
      work.strip[b * slots + j] = sequence.sink_source(p, group, j, sequence.evicted_end(p, plan.begin + b0 + b));
    }
    __syncthreads();
#pragma unroll 1
    for (int j = threadIdx.x; j < slots; j += kThreads) {
      int held = -1;
      int32_t* to = index_row(plan.begin + b0) + j;
#pragma unroll 2
      for (int b = b0; b < end; ++b, to += static_cast<int64_t>(p.gate_groups) * slots) {
        const int now = work.strip[(b - b0) * slots + j];
        *to = held = now == kAsBefore ? held : now;
      }
    }
    __syncthreads();
  }
}

// Calls found(slot, source, position) with what the exact slots [slot0, end) of one gate group hold in the new state, -1 where
// nothing. The whole block; ends with a barrier.
template <class Found>
__device__ inline void find_sources(const RetentionScan& p, const SequencePlan& plan, int group, int slot0, int end,
                                    const RowsMemory& work, Found found) {
  const int sinks = p.num_sinks;
  const int64_t state = plan.state_row(p, group);
  const int count = plan.segments(p), j = slot0 + static_cast<int>(threadIdx.x);
  if (j < min(end, sinks)) {
    const int source = plan.sink_source(p, group, j, plan.last_end(p));
    found(j, source, int64_t{source < 0 ? -1 : j});
  }
  const int32_t* ids = (count > 0 ? p.last_id : p.carried_id) + state * p.capacity;
#pragma unroll 1
  for (int e = threadIdx.x; e < p.capacity; e += kThreads) bring(p, work.id + e, ids + e);
  if (count == 0) wait_brought();  // else follow_slots does
  const int64_t segment = static_cast<int64_t>(plan.segment0(p)) * p.gate_groups + group;
  follow_slots(p, work.staged, state, segment, count, slot0 - sinks, end - sinks, [&](int slot, int rank) {
    const int id = work.id[rank];
    found(sinks + slot, plan.source_of_id(p, id),
          id >= 0 ? plan.evicted + id : id == -1 ? -1 : p.exact_pos[state * p.exact_slots + sinks - 2 - id]);
  });
}
__device__ inline void write_source(const RetentionScan& p, int64_t state, int slot, int source, int64_t position) {
  p.source[state * p.exact_slots + slot] = source;
  p.new_exact_pos[state * p.exact_slots + slot] = position;
}

// The counts of a sequence, whose segments have all been walked: what came into the banks, and the sinks among what left the
// ring. One warp.
__device__ inline void count_arrivals(const RetentionScan& p, const SequencePlan& plan) {
  const int64_t first = static_cast<int64_t>(plan.segment0(p)) * p.gate_groups;
  const int segments = plan.segments(p) * p.gate_groups;
  int sum = 0;
  for (int i = lane_id(); i < segments; i += kWarp) sum += p.arrived[first + i];
  sum = __reduce_add_sync(kAllLanes, sum);
  const int64_t pinned = min(plan.last_end(p), static_cast<int64_t>(p.num_sinks)) - plan.evicted;
  if (lane_id() == 0) write_counts(p, plan.number, sum + (pinned > 0 ? pinned * p.gate_groups : 0), 0);
}

inline size_t rows_bytes(const RetentionScan& p) {
  Carver sizes(nullptr);
  RowsMemory(sizes, p);
  return sizes.used();
}

__host__ __device__ inline int parts_of(const RetentionScan& p) {
  return (p.exact_slots + kWarps * p.copied - 1) / (kWarps * p.copied);
}

__host__ __device__ inline int64_t copies_of(const RetentionScan& p) { return p.sequences * p.kv_heads * parts_of(p); }

// The first blocks write the exact slots of the new state, which takes longest, the others the rows of the index.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) < 8 ? 4 : 2) retention_rows_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ SegmentPlan plan;
  __shared__ int source_of[kWarps * kSlotsAtOnce];
  wait_for_stream();
  let_next_start();
  const int block = static_cast<int>(blockIdx.x), copies = static_cast<int>(copies_of(p));
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const RowsMemory work(carver, p);
  if (block >= copies) {
    const int row = block - copies, group = row % p.gate_groups;
    SegmentPlan::put(&plan, p, row / p.gate_groups);
    __syncthreads();
    write_rows(p, plan, group, row, work);
    if (plan.before == 0 && group == 0 && warp_id() == 0) count_arrivals(p, plan.sequence);
    return;
  }
  const int parts = parts_of(p), head = block / parts % p.kv_heads, n = block / parts / p.kv_heads;
  const int first = block % parts * kWarps * p.copied, group = p.gate_groups == 1 ? 0 : head;
  const auto sequence = SequencePlan::of(p, n);
#pragma unroll 1
  for (int i = threadIdx.x; i < (p.has_bank_distance ? p.dim / 2 : 0); i += kThreads) bring(p, work.inv_freq + i, p.inv_freq + i);
  find_sources(p, sequence, group, first, min(first + kWarps * p.copied, p.exact_slots), work,
               [&](int slot, int source, int64_t position) {
                 source_of[slot - first] = source < 0 ? p.window + slot : source;
                 if (head == group) write_source(p, sequence.state_row(p, group), slot, source, position);
               });
  const int mine = warp_id() * p.copied, slot = first + mine;
  if (slot >= p.exact_slots) return;
  copy_slots<T, true>(p, ScanView<T>(p, n), head, p.window + slot, min(p.copied, p.exact_slots - slot),
                      [&](int i) { return source_of[mine + i]; }, p.wide, work.inv_freq);
}

int64_t blocks(const RetentionScan& p) { return copies_of(p) + p.segments * p.gate_groups; }

}  // namespace

size_t retention_rows_workspace(const RetentionScan& p) { return workspace_part(rows_bytes(p), blocks(p)); }

cudaError_t retention_rows(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  auto p = scan;
  p.block_bytes = rows_bytes(scan);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    p.wide = wide_rows<T>(p);
    return launch_early(retention_rows_kernel<T>, dim3(static_cast<unsigned>(blocks(p))), kThreads, shared_part(p.block_bytes),
                        stream, p);
  });
}

}  // namespace coda::kernels
