#include "retention_segments.cuh"

#include <algorithm>

namespace coda::kernels {
namespace {

constexpr size_t kListsLimit = 32 * 1024;  // bytes for lists that wait in shared memory

int staged_lists(const RetentionScan& p) {
  const size_t bytes = static_cast<size_t>(p.listed) * (sizeof(uint64_t) + sizeof(int32_t));
  return bytes == 0 ? 1 : static_cast<int>(std::clamp<size_t>(kListsLimit / bytes, 1, 32));
}

struct BankMemory {
  uint64_t* key;       // (2, capacity) the bank before and after a segment, in turns
  int32_t* source;     // (2, capacity)
  uint64_t* list_key;  // (lists, listed)
  int32_t* list_source;

  __host__ __device__ BankMemory(Carver& carver, int capacity, int listed, int lists)
      : key(carver.take<uint64_t>(2 * capacity)), source(carver.take<int32_t>(2 * capacity)),
        list_key(carver.take<uint64_t>(lists * listed)), list_source(carver.take<int32_t>(lists * listed)) {}
};

struct BanksParams : RetentionScan {
  int lists;  // that a block reads at once
};

// One block merges the lists of one sequence and gate group into the banks that stand between its segments.
__global__ void __launch_bounds__(1024) retention_banks_kernel(BanksParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const BankMemory work(carver, p.capacity, p.listed, p.lists);
  const RetentionView<float> view(p, blockIdx.x / p.gate_groups, static_cast<int>(blockIdx.x % p.gate_groups));
  const int capacity = p.capacity, listed = p.listed;
  const int64_t count = view.segment_count(), banks = view.bank_row(0), lists = view.segment_row(0);
  for (int j = threadIdx.x; j < capacity; j += blockDim.x) {
    work.key[j] = p.bank_key[banks * capacity + j];
    work.source[j] = p.bank_source[banks * capacity + j];
  }
  int now = 0, next = capacity;  // where in work.key and work.source
  for (int64_t s = 0; s < count; ++s) {
    const int staged = static_cast<int>(s % p.lists);
    if (staged == 0) {
      const int items = static_cast<int>(min(static_cast<int64_t>(p.lists), count - s)) * listed;
      for (int i = threadIdx.x; i < items; i += blockDim.x) {
        const int64_t at = (lists + (s + i / listed) * p.gate_groups) * listed + i % listed;
        work.list_key[i] = p.list_key[at];
        work.list_source[i] = p.list_source[at];
      }
      __syncthreads();
    }
    const uint64_t *bank = work.key + now, *list = work.list_key + staged * listed;
    const int64_t after = (banks + (s + 1) * p.gate_groups) * capacity;
    for (int e = threadIdx.x; e < capacity + listed; e += blockDim.x) {
      const int i = e - capacity;
      const bool held = i < 0;
      const uint64_t key = held ? bank[e] : list[i];
      // Between equal keys the later token wins, and that is the one from the list.
      const int rank = held ? e + count_above(list, listed, key - 1) : i + count_above(bank, capacity, key);
      if (rank >= capacity) continue;
      const int32_t source = held ? work.source[now + e] : work.list_source[staged * listed + i];
      work.key[next + rank] = key;
      work.source[next + rank] = source;
      p.bank_key[after + rank] = key;
      p.bank_source[after + rank] = source;
    }
    __syncthreads();
    now = capacity - now;
    next = capacity - next;
  }
}

BanksParams banks_params(const RetentionScan& p) {
  BanksParams params{p, staged_lists(p)};
  Carver sizes(nullptr);
  BankMemory(sizes, p.capacity, p.listed, params.lists);
  params.block_bytes = sizes.used();
  return params;
}

}  // namespace

size_t retention_banks_block(const RetentionScan& p) { return banks_params(p).block_bytes; }

cudaError_t retention_banks(const RetentionScan& p, cudaStream_t stream) {
  const auto params = banks_params(p);
  const int threads = std::clamp((p.capacity + p.listed + kWarp - 1) / kWarp * kWarp, kWarp, 1024);
  return launch(retention_banks_kernel, dim3(static_cast<unsigned>(p.sequences * p.gate_groups)), threads,
                shared_part(params.block_bytes), stream, params);
}

}  // namespace coda::kernels
