#include "retention_segments.cuh"

#include <algorithm>

#include <cuda_pipeline_primitives.h>

namespace coda::kernels {
namespace {

constexpr size_t kStagedLimit = 32 * 1024;

struct SlotsParams : RetentionScan {
  int staged;  // segments whose rank_after is read at once
  bool in_shared;
};

// One block follows the slots of one sequence and gate group from bank to bank and writes the memory that is left.
__global__ void __launch_bounds__(1024) retention_slots_kernel(SlotsParams p) {
  extern __shared__ int32_t staged[];
  const int group = static_cast<int>(blockIdx.x) % p.gate_groups;
  const auto plan = SequencePlan::of(p, static_cast<int>(blockIdx.x) / p.gate_groups);
  const int capacity = p.capacity, count = plan.segments(p);
  const int64_t stride = static_cast<int64_t>(p.gate_groups) * capacity, state = plan.state_row(p, group) * p.exact_slots;
  const int64_t segment = static_cast<int64_t>(plan.segment0(p)) * p.gate_groups + group;
  const int32_t* steps = p.rank_after + segment * capacity;
  const int64_t first_bank = (segment + plan.number * p.gate_groups) * capacity, last_bank = first_bank + count * stride;
  for (int base = 0; base < capacity; base += blockDim.x) {
    const int slot = base + threadIdx.x;
    const bool mine = slot < capacity;
    int rank = mine ? p.bank_rank[first_bank + slot] : 0;
    int64_t bank = first_bank;
    for (int s = 0; s < count; s += p.staged) {
      const int now = min(p.staged, count - s);
      if (p.in_shared) {
        __syncthreads();
        for (int i = warp_id(); i < now; i += warp_count()) {
          for (int e = lane_id(); e < capacity; e += kWarp) {
            __pipeline_memcpy_async(staged + i * capacity + e, steps + (s + i) * stride + e, sizeof(int32_t));
          }
        }
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncthreads();
      }
      for (int i = 0; mine && i < now; ++i) {
        rank = p.in_shared ? staged[i * capacity + rank] : steps[(s + i) * stride + rank];
        bank += stride;
        p.bank_rank[bank + slot] = rank;
        p.bank_slot[bank + rank] = slot;
      }
    }
    if (!mine) continue;
    const int id = p.bank_id[last_bank + rank];
    p.source[state + p.num_sinks + slot] = plan.source_of_id(p, id);
    p.new_exact_pos[state + p.num_sinks + slot] =
        id >= 0 ? plan.evicted + id : id == -1 ? -1 : p.exact_pos[state + p.num_sinks - 2 - id];
  }
  const int64_t end = plan.chunks > 0 ? plan.evicted_end(p, plan.chunks - 1) : 0;
  for (int j = threadIdx.x; j < p.num_sinks; j += blockDim.x) {
    const int source = plan.sink_source(p, group, j, end);
    p.source[state + j] = source;
    p.new_exact_pos[state + j] = source < 0 ? -1 : j;
  }
  if (threadIdx.x == 0) {
    const int64_t pinned = min(end, static_cast<int64_t>(p.num_sinks)) - plan.evicted;
    add_count(p.new_counts + 2 * plan.number, pinned > 0 ? pinned : 0);
  }
}

}  // namespace

cudaError_t retention_slots(const RetentionScan& p, cudaStream_t stream) {
  const size_t bytes = p.capacity * sizeof(int32_t);
  const bool in_shared = bytes <= kSharedLimit;
  const int staged = static_cast<int>(in_shared ? std::max<size_t>(kStagedLimit / std::max<size_t>(bytes, 1), 1) : 1);
  // More threads than slots: they bring what the slots are followed through.
  const int threads = std::clamp((p.capacity + kWarp - 1) / kWarp * kWarp, 512, 1024);
  return launch(retention_slots_kernel, dim3(static_cast<unsigned>(p.sequences * p.gate_groups)), threads,
                in_shared ? staged * bytes : 0, stream, SlotsParams{p, staged, in_shared});
}

}  // namespace coda::kernels
