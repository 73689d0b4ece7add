#include "new_state.cuh"
#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr size_t kStagedLimit = 16 * 1024;

struct RowsParams : RetentionScan {
  int staged;    // segments whose rank_after is read at once
  int per_warp;  // exact slots of the new state
  bool wide;
};

struct RowsMemory {
  int32_t* staged;   // (staged, capacity)
  int32_t* slot_of;  // (capacity) by rank before the segment
  int32_t* id;       // (capacity) likewise, as the next two from the step before
  int32_t* until;    // (capacity)
  int2* stay;        // (segment_tokens)

  __host__ __device__ RowsMemory(Carver& carver, int lists, int capacity, int tokens)
      : staged(carver.take<int32_t>(lists * capacity)), slot_of(carver.take<int32_t>(capacity)),
        id(carver.take<int32_t>(capacity)), until(carver.take<int32_t>(capacity)), stay(carver.take<int2>(tokens)) {}
};

int staged_lists(const RetentionScan& p) {
  return std::max(static_cast<int>(kStagedLimit / (std::max(p.capacity, 1) * sizeof(int32_t))), 1);
}

// Follows the slots [begin, end), of which those below 0 are none, through the first `count` segments of a sequence, which start
// at `segment`: calls found(slot, rank) with the rank that what is in a slot has then. The whole block; ends with a barrier.
template <class Found>
__device__ inline void follow_slots(const RowsParams& p, int32_t* staged, int64_t state, int64_t segment, int count, int begin,
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

// The rows of one segment, those that no chunk uses as well.
__device__ inline void write_rows(const RowsParams& p, const SegmentPlan& plan, int group, int64_t row, const RowsMemory& work) {
  const auto& sequence = plan.sequence;
  const int rows = plan.rows, used = plan.used, sinks = p.num_sinks, slots = p.exact_slots, capacity = p.capacity;
  const int64_t stride = static_cast<int64_t>(p.gate_groups) * slots;
  int32_t* index = p.index + (static_cast<int64_t>(sequence.row0 + plan.begin) * p.gate_groups + group) * slots;
#pragma unroll 1
  for (int i = threadIdx.x; i < (rows - used) * slots; i += kThreads) index[(used + i / slots) * stride + i % slots] = -1;
  if (used == 0) return;
  const auto hold = [&](int slot, int id, int from, int until) {
    const int source = sequence.source_of_id(p, id);
    int32_t* to = index + from * stride + sinks + slot;
#pragma unroll 1
    for (int b = from; b < min(until, used); ++b, to += stride) *to = source;
  };
#pragma unroll 1
  for (int e = threadIdx.x; e < capacity; e += kThreads) {
    bring(p, work.id + e, p.bank_id + row * capacity + e);
    bring(p, work.until + e, p.bank_until + row * capacity + e);
  }
#pragma unroll 1
  for (int c = threadIdx.x; c < p.segment_tokens; c += kThreads) {
    bring(p, work.stay + c, p.token_stay + row * p.segment_tokens + c);
  }
  const int before = plan.before(p);
  if (before == 0 || capacity == 0) wait_brought();  // else follow_slots does
  follow_slots(p, work.staged, sequence.state_row(p, group), row - static_cast<int64_t>(before) * p.gate_groups, before,
               0, capacity, [&](int slot, int rank) {
                 work.slot_of[rank] = slot;
                 hold(slot, work.id[rank], 0, work.until[rank]);
               });
  const int first = sequence.first_id + plan.begin * p.chunk;
#pragma unroll 1
  for (int c = threadIdx.x; c < p.segment_tokens; c += kThreads) {
    const int2 stay = work.stay[c];
    if (stay.x > 0) hold(work.slot_of[stay.y], first + c, p.by_chunk.quotient(c), stay.x);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < used * sinks; i += kThreads) {
    const int b = i / sinks, j = i % sinks;
    index[b * stride + j] = sequence.sink_source(p, group, j, sequence.evicted_end(p, plan.begin + b));
  }
}

// The sources of the exact slots [slot0, end) of one KV head, which the new state gets. The whole block.
__device__ inline void find_sources(const RowsParams& p, int n, int head, int slot0, int end, const RowsMemory& work,
                                    int* source_of) {
  const int group = p.gate_groups == 1 ? 0 : head, sinks = p.num_sinks;
  const auto plan = SequencePlan::of(p, n);
  const int64_t state = plan.state_row(p, group);
  const int count = plan.segments(p), j = slot0 + static_cast<int>(threadIdx.x);
  const auto put = [&](int slot, int source, int64_t position) {
    source_of[slot - slot0] = source < 0 ? p.window + slot : source;
    if (head != group) return;
    p.source[state * p.exact_slots + slot] = source;
    p.new_exact_pos[state * p.exact_slots + slot] = position;
  };
  if (j < min(end, sinks)) {
    const int source = plan.sink_source(p, group, j, plan.last_end(p));
    put(j, source, source < 0 ? -1 : j);
  }
  const int32_t* ids = (count > 0 ? p.last_id : p.carried_id) + state * p.capacity;
  const int64_t segment = static_cast<int64_t>(plan.segment0(p)) * p.gate_groups + group;
  follow_slots(p, work.staged, state, segment, count, slot0 - sinks, end - sinks, [&](int slot, int rank) {
    const int id = ids[rank];
    put(sinks + slot, plan.source_of_id(p, id),
        id >= 0 ? plan.evicted + id : id == -1 ? -1 : p.exact_pos[state * p.exact_slots + sinks - 2 - id]);
  });
}

__host__ __device__ inline int parts_of(const RowsParams& p) {
  return (p.exact_slots + kWarps * p.per_warp - 1) / (kWarps * p.per_warp);
}

// The first blocks write the rows of the index, the others the exact slots of the new state.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) retention_rows_kernel(RowsParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ SegmentPlan plan;
  __shared__ int source_of[kWarps * kSlotsAtOnce];
  const int row_blocks = static_cast<int>(p.segments) * p.gate_groups;
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const RowsMemory work(carver, p.staged, p.capacity, p.segment_tokens);
  if (static_cast<int>(blockIdx.x) < row_blocks) {
    SegmentPlan::put(&plan, p, static_cast<int>(blockIdx.x) / p.gate_groups);
    __syncthreads();
    write_rows(p, plan, static_cast<int>(blockIdx.x) % p.gate_groups, blockIdx.x, work);
    return;
  }
  const int block = static_cast<int>(blockIdx.x) - row_blocks, parts = parts_of(p);
  const int head = block / parts % p.kv_heads, n = block / parts / p.kv_heads, first = block % parts * kWarps * p.per_warp;
  find_sources(p, n, head, first, min(first + kWarps * p.per_warp, p.exact_slots), work, source_of);
  const int mine = warp_id() * p.per_warp, slot = first + mine;
  if (slot >= p.exact_slots) return;
  copy_slots<T, true>(p, ScanView<T>(p, n), head, p.window + slot, min(p.per_warp, p.exact_slots - slot),
                      [&](int i) { return source_of[mine + i]; }, p.wide);
}

int64_t blocks(const RowsParams& p) { return p.segments * p.gate_groups + p.sequences * p.kv_heads * parts_of(p); }
RowsParams with_plan(const RetentionScan& scan) {
  RowsParams p{scan, staged_lists(scan), slots_of_warp(scan), false};
  Carver sizes(nullptr);
  RowsMemory(sizes, p.staged, p.capacity, p.segment_tokens);
  p.block_bytes = sizes.used();
  return p;
}

}  // namespace

size_t retention_rows_workspace(const RetentionScan& scan) {
  const auto p = with_plan(scan);
  return workspace_part(p.block_bytes, blocks(p));
}

cudaError_t retention_rows(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  auto p = with_plan(scan);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    p.wide = wide_rows<T>(p);
    return launch(retention_rows_kernel<T>, dim3(static_cast<unsigned>(blocks(p))), kThreads, shared_part(p.block_bytes),
                  stream, p);
  });
}

}  // namespace coda::kernels
