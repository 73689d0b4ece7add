#include "retention_segments.cuh"

#include <algorithm>

namespace coda::kernels {
namespace {

constexpr size_t kStagedLimit = 32 * 1024;

struct SlotsParams : RetentionScan {
  int staged;  // segments whose rank_after is read at once; 0 if not even one fits
};

// One block follows the slots of one sequence and gate group from bank to bank and writes the memory that is left.
__global__ void __launch_bounds__(1024) retention_slots_kernel(SlotsParams p) {
  extern __shared__ int32_t staged[];
  const RetentionView<float> view(p, blockIdx.x / p.gate_groups, static_cast<int>(blockIdx.x % p.gate_groups));
  const int capacity = p.capacity;
  const int64_t count = view.segment_count(), stride = static_cast<int64_t>(p.gate_groups) * capacity;
  const int64_t first_bank = view.bank_row(0) * capacity, last_bank = first_bank + count * stride;
  const int32_t* steps = p.rank_after + view.segment_row(0) * capacity;
  const int64_t state = view.state_exact();
  for (int base = 0; base < capacity; base += blockDim.x) {
    const int j = base + threadIdx.x;
    const bool mine = j < capacity;
    const int slot = mine ? p.bank_slot[first_bank + j] : 0;
    int rank = j;
    for (int64_t s = 0; s < count; s += p.staged ? p.staged : count) {
      const int steps_now = static_cast<int>(p.staged ? min(static_cast<int64_t>(p.staged), count - s) : count);
      if (p.staged) {
        __syncthreads();
        for (int i = threadIdx.x; i < steps_now * capacity; i += blockDim.x) {
          staged[i] = steps[(s + i / capacity) * stride + i % capacity];
        }
        __syncthreads();
      }
      for (int i = 0; mine && i < steps_now; ++i) {
        rank = p.staged ? staged[i * capacity + rank] : steps[(s + i) * stride + rank];
        p.bank_slot[first_bank + (s + i + 1) * stride + rank] = slot;
      }
    }
    if (!mine) continue;
    const int source = p.bank_source[last_bank + rank];
    const bool carried = source >= p.window && source < view.held();
    p.source[state + p.num_sinks + slot] = source;
    p.new_exact_pos[state + p.num_sinks + slot] =
        source < 0 ? -1 : carried ? p.exact_pos[state + source - p.window] : view.position_of(source);
  }
  const int64_t end = view.span.chunks > 0 ? view.evicted_end(view.span.chunks - 1) : 0;
  for (int j = threadIdx.x; j < p.num_sinks; j += blockDim.x) {
    const int source = view.sink_source(j, end);
    p.source[state + j] = source;
    p.new_exact_pos[state + j] = source < 0 ? -1 : j;
  }
  if (threadIdx.x == 0) {
    const int64_t pinned = min(end, static_cast<int64_t>(p.num_sinks)) - view.evicted;
    add_count(p.new_counts + 2 * view.n, pinned > 0 ? pinned : 0);
  }
}

}  // namespace

cudaError_t retention_slots(const RetentionScan& p, cudaStream_t stream) {
  const size_t bytes = p.capacity * sizeof(int32_t);
  const int staged = bytes == 0 ? 1 : bytes > kSharedLimit ? 0 : static_cast<int>(std::max<size_t>(kStagedLimit / bytes, 1));
  const int threads = std::clamp((p.capacity + kWarp - 1) / kWarp * kWarp, kWarp, 1024);
  return launch(retention_slots_kernel, dim3(static_cast<unsigned>(p.sequences * p.gate_groups)), threads, staged * bytes, stream,
                SlotsParams{p, staged});
}

}  // namespace coda::kernels
