#include "retention_segments.cuh"

#include <algorithm>

#include <cuda_pipeline_primitives.h>

namespace coda::kernels {
namespace {

constexpr int kAhead = 4;  // lists on their way at once

// As count_above, with half as many loads one after the other: a block that is alone on its multiprocessor waits for each.
__device__ inline int count_above_in_quarters(const uint64_t* list, int count, uint64_t key) {
  const uint64_t* from = list;
  while (count > 4) {
    const int quarter = count / 4;
    from += quarter * ((from[quarter - 1] > key) + (from[2 * quarter - 1] > key) + (from[3 * quarter - 1] > key));
    count -= 3 * quarter;
  }
  int above = static_cast<int>(from - list);
#pragma unroll
  for (int i = 0; i < 4; ++i) above += i < count && from[i] > key;
  return above;
}

struct BankMemory {
  uint64_t* key;         // (2, capacity) the bank before and after a segment
  int32_t* id;           // (2, capacity)
  uint64_t* list_key;    // (kAhead, listed) the best tokens of a segment
  int32_t* list_token;   // (kAhead, listed)

  __host__ __device__ BankMemory(Carver& carver, int capacity, int listed)
      : key(carver.take<uint64_t>(2 * capacity)), id(carver.take<int32_t>(2 * capacity)),
        list_key(carver.take<uint64_t>(kAhead * listed)), list_token(carver.take<int32_t>(kAhead * listed)) {}
};

// One block merges the tokens of one sequence and gate group, segment by segment, into the banks that stand between them.
__global__ void __launch_bounds__(1024) retention_banks_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int group = static_cast<int>(blockIdx.x) % p.gate_groups;
  const auto plan = SequencePlan::of(p, static_cast<int>(blockIdx.x) / p.gate_groups);
  const int capacity = p.capacity, listed = p.listed, count = plan.segments(p);
  const int64_t segment = static_cast<int64_t>(plan.segment0(p)) * p.gate_groups + group;
  const int64_t bank_row = (segment + plan.number * p.gate_groups) * capacity, list_row = segment * p.segment_tokens;
  const int64_t bank_stride = static_cast<int64_t>(p.gate_groups) * capacity;
  const int64_t list_stride = static_cast<int64_t>(p.gate_groups) * p.segment_tokens;
  const bool in_shared = p.block_bytes <= kSharedLimit;
  // Half of the threads look for the new ranks of what is held, the others for those of the list.
  const int thread = static_cast<int>(threadIdx.x), half = static_cast<int>(blockDim.x) / 2, mine = thread % half;

  with_block_memory(p, shared, [&](Carver& carver) {
    const BankMemory work(carver, capacity, listed);
    const auto fetch = [&](int s) {
      const int to = s % kAhead * listed;
      const int64_t from = list_row + s * list_stride;
      for (int i = thread; s < count && i < listed; i += 2 * half) {
        if (in_shared) {
          __pipeline_memcpy_async(work.list_key + to + i, p.token_key + from + i, sizeof(uint64_t));
          __pipeline_memcpy_async(work.list_token + to + i, p.token + from + i, sizeof(int32_t));
        } else {
          work.list_key[to + i] = p.token_key[from + i];
          work.list_token[to + i] = p.token[from + i];
        }
      }
      __pipeline_commit();
    };
    for (int s = 0; s < kAhead - 1; ++s) fetch(s);
    for (int j = thread; j < capacity; j += 2 * half) {
      work.key[j] = p.bank_key[bank_row + j];
      work.id[j] = p.bank_id[bank_row + j];
    }
    uint64_t* key_after = p.bank_key + bank_row;
    int32_t* id_after = p.bank_id + bank_row;
    int now = 0, next = capacity;  // where in work.key and work.id
    int first_id = plan.first_id;
    for (int s = 0; s < count; ++s) {
      __pipeline_wait_prior(kAhead - 2);
      __syncthreads();
      fetch(s + kAhead - 1);
      const uint64_t *bank = work.key + now, *list = work.list_key + s % kAhead * listed;
      const int32_t* tokens = work.list_token + s % kAhead * listed;
      key_after += bank_stride;
      id_after += bank_stride;
      const auto put = [&](int rank, uint64_t key, int32_t id) {
        if (rank >= capacity) return;
        work.key[next + rank] = key;
        work.id[next + rank] = id;
        key_after[rank] = key;
        id_after[rank] = id;
      };
      // Between equal keys the later token wins, and that is the one from the list.
      if (thread < half) {
        for (int e = mine; e < capacity; e += half) {
          put(e + count_above_in_quarters(list, listed, bank[e] - 1), bank[e], work.id[now + e]);
        }
      } else {
        for (int i = mine; i < listed; i += half) {
          put(i + count_above_in_quarters(bank, capacity, list[i]), list[i], first_id + tokens[i]);
        }
      }
      now = capacity - now;
      next = capacity - next;
      first_id += p.segment_tokens;
    }
  });
}

}  // namespace

size_t retention_banks_block(const RetentionScan& p) {
  Carver sizes(nullptr);
  BankMemory(sizes, p.capacity, p.listed);
  return sizes.used();
}

cudaError_t retention_banks(const RetentionScan& scan, cudaStream_t stream) {
  RetentionScan p = scan;
  p.block_bytes = retention_banks_block(scan);
  const int half = std::clamp((p.capacity + kWarp - 1) / kWarp * kWarp, kWarp, 512);
  return launch(retention_banks_kernel, dim3(static_cast<unsigned>(p.sequences * p.gate_groups)), 2 * half,
                shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
