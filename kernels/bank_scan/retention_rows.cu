#include "new_state.cuh"
#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr size_t kStagedLimit = 16 * 1024;

struct RowsParams : RetentionScan {
  int staged;  // segments whose rank_after is read at once
  bool wide;
};

struct RowsMemory {
  int32_t* staged;   // (staged, capacity)
  int32_t* slot_of;  // (capacity) by rank before the segment

  __host__ __device__ RowsMemory(Carver& carver, int lists, int capacity)
      : staged(carver.take<int32_t>(lists * capacity)), slot_of(carver.take<int32_t>(capacity)) {}
};

int staged_lists(const RetentionScan& p) {
  return std::max(static_cast<int>(kStagedLimit / (std::max(p.capacity, 1) * sizeof(int32_t))), 1);
}

// Follows the slots [begin, end), of which those below 0 are none, through the first `count` segments of a sequence, which start at
// `segment`: calls found(slot, rank) with the rank that what is in a slot has then. The whole block; ends with a barrier.
template <class Found>
__device__ inline void follow_slots(const RowsParams& p, int32_t* staged, int64_t state, int64_t segment, int count, int begin,
                                    int end, Found found) {
  const int capacity = p.capacity;
  for (; begin < end; begin += kThreads) {
    const int slot = begin + static_cast<int>(threadIdx.x);
    const bool mine = slot >= 0 && slot < end;
    int rank = mine ? p.carried_rank[state * capacity + slot] : 0;
    for (int s = 0; s < count; s += p.staged) {
      const int now = min(p.staged, count - s);
      for (int i = warp_id(); i < now; i += kWarps) {
        const int64_t from = (segment + static_cast<int64_t>(s + i) * p.gate_groups) * capacity;
        for (int e = lane_id(); e < capacity; e += kWarp) bring(p, staged + i * capacity + e, p.rank_after + from + e);
      }
      wait_brought();
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
  for (int i = threadIdx.x; i < (rows - used) * slots; i += kThreads) index[(used + i / slots) * stride + i % slots] = -1;
  for (int i = threadIdx.x; i < used * sinks; i += kThreads) {
    const int b = i / sinks, j = i % sinks;
    index[b * stride + j] = sequence.sink_source(p, group, j, sequence.evicted_end(p, plan.begin + b));
  }
  if (used == 0) return;
  const auto hold = [&](int slot, int id, int from, int until) {
    const int source = sequence.source_of_id(p, id);
    int32_t* to = index + from * stride + sinks + slot;
    for (int b = from; b < min(until, used); ++b, to += stride) *to = source;
  };
  const int before = plan.before(p);
  follow_slots(p, work.staged, sequence.state_row(p, group), row - static_cast<int64_t>(before) * p.gate_groups, before,
               0, capacity, [&](int slot, int rank) {
                 work.slot_of[rank] = slot;
                 hold(slot, p.bank_id[row * capacity + rank], 0, p.bank_until[row * capacity + rank]);
               });
  const int first = sequence.first_id + plan.begin * p.chunk;
  for (int c = threadIdx.x; c < p.segment_tokens; c += kThreads) {
    const int2 stay = p.token_stay[row * p.segment_tokens + c];
    if (stay.x > 0) hold(work.slot_of[stay.y], first + c, c / p.chunk, stay.x);
  }
}

// Exact slots of the new state, a warp a slot.
template <class T>
__device__ inline void copy_bank_slots(const RowsParams& p, int64_t n, int head, int slot0, const RowsMemory& work) {
  __shared__ int source_of[kWarps];
  const int group = p.gate_groups == 1 ? 0 : head, sinks = p.num_sinks;
  const auto plan = SequencePlan::of(p, static_cast<int>(n));
  const int64_t state = plan.state_row(p, group);
  const int count = plan.segments(p), j = slot0 + static_cast<int>(threadIdx.x);
  const auto put = [&](int slot, int source, int64_t position) {
    source_of[slot - slot0] = source;
    if (head != group) return;
    p.source[state * p.exact_slots + slot] = source;
    p.new_exact_pos[state * p.exact_slots + slot] = position;
  };
  if (threadIdx.x < kWarps && j < sinks) {
    const int source = plan.sink_source(p, group, j, plan.last_end(p));
    put(j, source, source < 0 ? -1 : j);
  }
  const int32_t* ids = (count > 0 ? p.last_id : p.carried_id) + state * p.capacity;
  follow_slots(p, work.staged, state, static_cast<int64_t>(plan.segment0(p)) * p.gate_groups + group, count, slot0 - sinks,
               min(slot0 + kWarps, p.exact_slots) - sinks, [&](int slot, int rank) {
                 const int id = ids[rank];
                 put(sinks + slot, plan.source_of_id(p, id),
                     id >= 0 ? plan.evicted + id : id == -1 ? -1 : p.exact_pos[state * p.exact_slots + sinks - 2 - id]);
               });
  const int slot = slot0 + warp_id();
  if (slot >= p.exact_slots) return;
  const int source = source_of[warp_id()];
  copy_slot<T>(p, ScanView<T>(p, n), head, p.window + slot, source < 0 ? p.window + slot : source, p.wide);
}

// The first blocks write the rows of the index, then come the exact slots of the new state, then its ring.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) retention_rows_kernel(RowsParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ SegmentPlan plan;
  let_next_launch_come();
  int64_t block = blockIdx.x;
  const int64_t row_blocks = p.segments * p.gate_groups, per_head = (p.exact_slots + kWarps - 1) / kWarps;
  const int64_t bank_blocks = p.sequences * p.kv_heads * per_head;
  if (block >= row_blocks + bank_blocks) {  // reads nothing of the scan
    const int64_t slot = (block - row_blocks - bank_blocks) * kWarps + warp_id(), row = slot / p.window;
    if (row >= p.sequences * p.kv_heads) return;
    copy_ring_slot<T>(p, row / p.kv_heads, static_cast<int>(row % p.kv_heads), static_cast<int>(slot % p.window), p.wide);
    return;
  }
  const bool rows = block < row_blocks;
  if (rows) SegmentPlan::put(&plan, p, static_cast<int>(block / p.gate_groups));
  wait_for_previous_launch();
  __syncthreads();
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const RowsMemory work(carver, p.staged, p.capacity);
  if (rows) {
    write_rows(p, plan, static_cast<int>(block % p.gate_groups), block, work);
  } else {
    block -= row_blocks;
    const int64_t head = block / per_head;
    copy_bank_slots<T>(p, head / p.kv_heads, static_cast<int>(head % p.kv_heads), static_cast<int>(block % per_head) * kWarps, work);
  }
}

int64_t bank_blocks(const RetentionScan& p) { return p.sequences * p.kv_heads * ((p.exact_slots + kWarps - 1) / kWarps); }

}  // namespace

size_t retention_rows_workspace(const RetentionScan& p) {
  Carver sizes(nullptr);
  RowsMemory(sizes, staged_lists(p), p.capacity);
  return workspace_part(sizes.used(), p.segments * p.gate_groups + bank_blocks(p));
}

cudaError_t retention_rows(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  RowsParams p{scan, staged_lists(scan), false};
  Carver sizes(nullptr);
  RowsMemory(sizes, p.staged, p.capacity);
  p.block_bytes = sizes.used();
  const int64_t ring = (p.sequences * p.kv_heads * p.window + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(p.segments * p.gate_groups + bank_blocks(p) + ring));
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    p.wide = wide_rows<T>(p);
    return launch_behind(retention_rows_kernel<T>, grid, kThreads, shared_part(p.block_bytes), stream, p);
  });
}

}  // namespace coda::kernels
