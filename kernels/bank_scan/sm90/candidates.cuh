#pragma once

#include "../../common/workspace.cuh"
#include "../scan_view.cuh"
#include "routing.cuh"
#include "steps.h"

namespace coda::kernels::sm90 {

// What one head needs of a chunk's candidates for the exact bank, copied as one piece.
template <class T, int kDim>
struct alignas(16) ExactCandidates {
  T value[kTileRows * kDim];                // packed for a warp
  float norm[kTileRows];
  uint32_t gram[kTileRows * kTileRows];     // keys of the mean cosines among them
  uint32_t before[kTileRows * kTileRows];   // and with those of the chunk before
  int source[kTileRows], offset[kTileRows];  // flat source, and offset among the evicted tokens; -1 beyond the last
};

// Where the summary bank's block of one head finds a candidate; any row beyond the last.
struct alignas(16) CandidateRows {
  const void *key, *value;
};

// Which of a chunk's candidates went to a slot: bits of candidates c and c + 32, and in each word a bit that it is there.
struct alignas(16) SlotMembers {
  uint64_t low, high;
};
constexpr uint64_t kThere = uint64_t{1} << 32;

constexpr int kSplits = 4;  // blocks that share the summary list of a chunk row

// What can be said of a chunk's candidates without the banks, for all chunk rows that evict. It is written while the scan runs.
struct CandidateLists {
  int tokens;                   // row length of the summary lists
  int exact_parts, parts;       // of a chunk row: 1 for the exact bank, and kSplits more for the summaries
  uint32_t* exact_ready;        // (NC) not 0 once the list is there
  uint32_t* summary_ready;      // (NC, kSplits) likewise, of its parts
  unsigned char* exact;         // (NC, Hkv) ExactCandidates
  int* summary_count;           // (NC)
  CandidateRows* summary_rows;  // (NC, Hkv, tokens)
  int* summary_offset;          // (NC, tokens)
  float* summary_gate;          // (NC, tokens)
  float* summary_norm;          // (NC, Hkv, tokens)
  SlotMembers* members;         // (NC, Ms) 0 until the scan of the summaries has decided

  __host__ __device__ CandidateLists(Carver& carver, const BankScanParams& p, Banks banks)
      : tokens((p.chunk + 3) / 4 * 4), exact_parts(banks.exact), parts(exact_parts + (banks.summary ? kSplits : 0)),
        exact_ready(carver.take<uint32_t>(banks.exact ? p.chunk_rows : 0)),
        summary_ready(carver.take<uint32_t>(banks.summary ? p.chunk_rows * kSplits : 0)) {
    const int64_t exact_rows = banks.exact ? p.chunk_rows : 0, rows = banks.summary ? p.chunk_rows : 0;
    const size_t bytes = p.dim == 64 ? sizeof(ExactCandidates<__half, 64>) : sizeof(ExactCandidates<__half, 128>);
    exact = carver.take<unsigned char>(exact_rows * p.kv_heads * bytes);
    summary_count = carver.take<int>(rows);
    summary_rows = carver.take<CandidateRows>(rows * p.kv_heads * tokens);
    summary_offset = carver.take<int>(rows * tokens);
    summary_gate = carver.take<float>(rows * tokens);
    summary_norm = carver.take<float>(rows * p.kv_heads * tokens);
    members = carver.take<SlotMembers>(rows * p.summary_slots);
  }

  // What tells that part `part` of a row is there.
  __device__ uint32_t* flag(int64_t row, int part) const {
    return part < exact_parts ? exact_ready + row : summary_ready + row * kSplits + part - exact_parts;
  }
  template <class T, int kDim>
  __device__ ExactCandidates<T, kDim>& of(int64_t row, int heads, int head) const {
    return reinterpret_cast<ExactCandidates<T, kDim>*>(exact)[row * heads + head];
  }
};

constexpr int kScanThreads = 512;  // of a block of either bank
constexpr int kMostChunk = 512;

struct BankScan : BankScanForward {
  Banks banks;
  CandidateLists lists;  // in the workspace
  bool copies;           // writes the new state as well: the ring beside the lists, exact slots in the end
  bool wide;             // wide_rows
};

// What one kernel tells another that runs: who loads a word that store_release wrote sees all that the writer saw before.
__device__ inline void store_release(uint32_t* to, uint32_t word) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ inline uint32_t load_acquire(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}
// Words that are all that is told.
__device__ inline void store_relaxed(SlotMembers* to, uint64_t low, uint64_t high) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
}
__device__ inline SlotMembers load_relaxed(const SlotMembers* from) {
  SlotMembers all;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(all.low), "=l"(all.high) : "l"(from) : "memory");
  return all;
}
// Between what was written or will be read as usual and what the copy engine does.
__device__ inline void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The scan starts when all blocks that write lists have waited for the stream; it need not wait itself once it has loaded what
// one of them stored since.
__device__ inline void follow_lists(const CandidateLists& lists) {
  if (lane_id() == 0) load_acquire(lists.flag(0, 0));
  __syncwarp();
}

// Which lists of one bank are there, of which each has kCount parts. By whole warps, each for itself: they look at the next 32
// chunks at once, so that they seldom have to.
template <int kCount>
struct ListGate {
  int there;  // chunks whose list is there, or that need none

  // Waits for the list of chunk i of `chunks`; flags are those of chunk 0. Returns whether it had to look.
  template <class Flags>
  __device__ bool await(int i, int chunks, Flags flags) {
    if (i < there) return false;
    while (i >= there) {
      const int mine = there + lane_id();
      const bool missing = mine < chunks && !listed(flags() + mine * kCount);
      const unsigned all = __ballot_sync(kAllLanes, missing);
      there += all == 0 ? kWarp : __ffs(all) - 1;
    }
    __syncwarp();
    return true;
  }

 private:
  static __device__ bool listed(const uint32_t* flags) {
    if constexpr (kCount == 1) {
      return load_acquire(flags) != 0;
    } else {
      static_assert(kCount == 4);
      uint4 all;
      asm volatile("ld.acquire.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(all.x), "=r"(all.y), "=r"(all.z), "=r"(all.w)
                   : "l"(flags)
                   : "memory");
      return all.x != 0 && all.y != 0 && all.z != 0 && all.w != 0;
    }
  }
};

// Launched before the scan, which starts beside it if `clusters` is not 0. Then lists are made by so many clusters of `blocks`
// blocks, as large as those of the scan, so that these find room: single blocks would lie everywhere.
cudaError_t list_candidates(const BankScan& params, DType dtype, int clusters, int blocks, cudaStream_t stream);

// Kernels of the scan with two blocks a head, a cluster for each sequence. The exact bank's is launched after the summaries' and
// runs beside it: as one kernel both were slower, for want of registers.
using ScanKernel = void (*)(BankScan);
ScanKernel exact_scan_in_halves(int dim, DType dtype);
ScanKernel summary_scan_in_halves(int dim, DType dtype);
// What of the summaries the scan does not wait for, and that is launched after it and runs beside it.
cudaError_t summary_keys(const BankScan& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm90
