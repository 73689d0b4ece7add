#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;

// One block writes the rows of one segment, those that no chunk uses as well.
__global__ void __launch_bounds__(kThreads) retention_rows_kernel(RetentionScan p) {
  const int group = static_cast<int>(blockIdx.x) % p.gate_groups;
  const SegmentPlan plan = p.plan[blockIdx.x / p.gate_groups];
  const auto& sequence = plan.sequence;
  const int rows = plan.rows, used = plan.used, sinks = p.num_sinks, slots = p.exact_slots;
  const int64_t stride = static_cast<int64_t>(p.gate_groups) * slots;
  int32_t* index = p.index + (static_cast<int64_t>(sequence.row0 + plan.begin) * p.gate_groups + group) * slots;
  for (int i = threadIdx.x; i < (rows - used) * slots; i += blockDim.x) index[(used + i / slots) * stride + i % slots] = -1;
  for (int i = threadIdx.x; i < used * sinks; i += blockDim.x) {
    const int b = i / sinks, j = i % sinks;
    index[b * stride + j] = sequence.sink_source(p, group, j, sequence.evicted_end(p, plan.begin + b));
  }
  if (used == 0) return;
  const int64_t row = blockIdx.x, bank = (row + static_cast<int64_t>(sequence.number) * p.gate_groups) * p.capacity;
  const auto hold = [&](int slot, int id, int from, int until) {
    const int source = sequence.source_of_id(p, id);
    int32_t* to = index + from * stride + sinks + slot;
    for (int b = from; b < min(until, used); ++b, to += stride) *to = source;
  };
  for (int slot = threadIdx.x; slot < p.capacity; slot += blockDim.x) {
    const int rank = p.bank_rank[bank + slot];
    hold(slot, p.bank_id[bank + rank], 0, p.bank_until[row * p.capacity + rank]);
  }
  const int first = sequence.first_id + plan.begin * p.chunk;
  for (int c = threadIdx.x; c < p.segment_tokens; c += blockDim.x) {
    const int2 stay = p.token_stay[row * p.segment_tokens + c];
    if (stay.x > 0) hold(p.bank_slot[bank + stay.y], first + c, c / p.chunk, stay.x);
  }
}

}  // namespace

cudaError_t retention_rows(const RetentionScan& p, cudaStream_t stream) {
  return launch(retention_rows_kernel, dim3(static_cast<unsigned>(p.segments * p.gate_groups)), kThreads, 0, stream, p);
}

}  // namespace coda::kernels
