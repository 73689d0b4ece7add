#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;

// Entries are the ranks of the bank before the segment, then its tokens as SortedChunks holds them.
struct WalkMemory {
  uint64_t* bank;       // (capacity)
  SortedChunks chunks;
  int* until;           // (capacity + segment_tokens) the first chunk in which an entry is no longer held, 0 for tokens that never were
  int* rank;            // (capacity + segment_tokens) the last that an entry has while it is held
  int* arrivals;        // (segment_tokens + 1) tokens before this one that came in; before that, whether this one does
  int* leaver;          // (segment_tokens) the entry whose slot the i-th arrival takes

  __host__ __device__ WalkMemory(Carver& carver, int capacity, int tokens)
      : bank(carver.take<uint64_t>(capacity)), chunks(carver, tokens), until(carver.take<int>(capacity + tokens)),
        rank(carver.take<int>(capacity + tokens)), arrivals(carver.take<int>(tokens + 1)), leaver(carver.take<int>(tokens)) {}
};

// One warp turns flags into the number of flags before each; entry `count` gets them all.
__device__ inline void count_before(int* flags, int count) {
  int total = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int i = base + lane_id();
    const unsigned mask = __ballot_sync(kAllLanes, i < count && flags[i]);
    if (i < count) flags[i] = total + __popc(mask & ((1u << lane_id()) - 1));
    total += __popc(mask);
  }
  if (lane_id() == 0) flags[count] = total;
}

// One block finds what comes and goes in one segment, given the bank before it, and which slot each arrival takes.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) retention_walk_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const RetentionSegment<A> segment(p, blockIdx.x);
  if (segment.used_rows() == 0) return;
  const int capacity = p.capacity, tokens = p.segment_tokens, chunk = p.chunk, chunks = p.segment_chunks;
  const WalkMemory work(carver, capacity, tokens);
  const uint64_t* sorted = work.chunks.key;
  const int64_t row = segment.view.segment_row(segment.number());
  const uint64_t* bank = p.bank_key + segment.view.bank_row(segment.number()) * capacity;
  for (int j = threadIdx.x; j < capacity; j += blockDim.x) work.bank[j] = bank[j];
  work.chunks.sort(segment, tokens, chunk);

  for (int e = threadIdx.x; e < capacity + tokens; e += blockDim.x) {
    const int i = e - capacity;
    const uint64_t key = i < 0 ? work.bank[e] : sorted[i];
    int rank = e, b = 0;
    bool enters = true;
    if (i >= 0) {
      // Between equal keys the later token wins.
      const int born = i / chunk;
      rank = i % chunk + count_above(work.bank, capacity, key);
      for (; b < born && rank < capacity; ++b) rank += count_above(sorted + b * chunk, chunk, key);
      enters = rank < capacity;
      work.arrivals[work.chunks.token[i]] = enters;
      b = born + 1;
    }
    for (; enters && b < chunks; ++b) {
      const int later = rank + count_above(sorted + b * chunk, chunk, key - 1);
      if (later >= capacity) break;
      rank = later;
    }
    work.until[e] = enters ? b : 0;
    work.rank[e] = rank;
  }
  __syncthreads();
  if (warp_id() == 0) count_before(work.arrivals, tokens);
  __syncthreads();
  // The k-th arrival of a chunk takes the slot of the k-th from the end of the bank before it. So the i-th arrival of the segment
  // does, too, if what leaves is numbered on from chunk to chunk.
  for (int e = threadIdx.x; e < capacity + tokens; e += blockDim.x) {
    const int until = work.until[e];
    if (until < chunks && (e < capacity || until > 0)) {
      work.leaver[work.arrivals[until * chunk] + capacity - 1 - work.rank[e]] = e;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < capacity + tokens; e += blockDim.x) {
    const int until = work.until[e], i = e - capacity;
    if (i < 0) {
      p.bank_until[row * capacity + e] = until;
    } else {
      p.token_until[row * tokens + work.chunks.token[i]] = until;
      if (until == 0) continue;
    }
    int place = e;
    while (place >= capacity) place = work.leaver[work.arrivals[work.chunks.token[place - capacity]]];
    if (i >= 0) p.token_place[row * tokens + work.chunks.token[i]] = place;
    if (until == chunks) p.rank_after[row * capacity + place] = work.rank[e];
  }
  if (threadIdx.x == 0) add_count(p.new_counts + 2 * segment.view.n, work.arrivals[tokens]);
}

}  // namespace

size_t retention_walk_block(const RetentionScan& p) {
  Carver sizes(nullptr);
  WalkMemory(sizes, p.capacity, p.segment_tokens);
  return sizes.used();
}

cudaError_t retention_walk(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  RetentionScan p = scan;
  p.block_bytes = retention_walk_block(scan);
  const dim3 grid(static_cast<unsigned>(p.segments * p.gate_groups));
  const auto kernel = dtype == DType::kFloat64 ? retention_walk_kernel<double> : retention_walk_kernel<float>;
  return launch(kernel, grid, kThreads, shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
