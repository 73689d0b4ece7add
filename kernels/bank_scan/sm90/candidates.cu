#include "../../common/mma.cuh"
#include "../../common/sequences.cuh"
#include "../clearing.cuh"
#include "../new_state.cuh"
#include "candidates.cuh"
#include "cluster.cuh"

namespace coda::kernels::sm90 {
namespace {

constexpr int kThreads = 256, kMostThreads = 768;  // of a block, and of one that has a multiprocessor for itself
constexpr int kRowsAtOnce = kTileRows;  // rows of a warp whose loads are underway together
constexpr size_t kWholeShared = 120 * 1024;  // more than half of what a multiprocessor has

struct ListCandidates : BankScan {
  int strip, strips;  // rows at a time, of each sequence or of all
  bool beside;        // the scan
  int ring_parts;
};

__device__ inline int64_t row_of(const BankScanParams& p, int64_t sequence) {
  return p.cu_seqlens[sequence] / p.chunk + 2 * sequence;
}

// Of a fixed size, so that addresses are constants.
struct ListShared {
  float logit[2 * kMostChunk];    // of this chunk, then of the one before
  bool chosen[2 * kMostChunk];    // for the exact bank
  int candidate[2 * kMostChunk];  // offsets of those
  int offset[kMostChunk];         // offsets of the summary bank's
  int source[kMostChunk];         // their flat sources; (2, 8) of the exact bank's, the last one repeated
  int counts[2];                  // candidates of both chunks
  float norm[2 * kTileRows][kClusterBlocks];              // (2, 8, Hkv)
  float dot[kClusterBlocks * 2][kTileRows * kTileRows];   // (2, Hkv, 64) of this chunk's with each other, then with those before
  alignas(16) uint16_t value[2 * kTileRows * kClusterBlocks * 128];  // (2, 8, Hkv, D)
};

// What both lists begin with: a chunk row that evicts. Loops are kept short, since most of such a block's time goes to fetching
// code that runs once.
template <class T>
struct Row {
  const BankScan& p;
  const ScanView<T> view;
  ListShared& work;
  int row, pinned;  // sinks among those that leave the ring
  int64_t evicted;  // the first of those

  // The flat source of token c of this chunk, or of the one before it.
  __device__ int token(int which, int c) const { return view.source_of(evicted - which * p.chunk + c); }
  // Ends with a barrier.
  __device__ void load_logits(int chunks) const {
#pragma unroll 1
    for (int item = threadIdx.x; item < chunks * p.chunk; item += blockDim.x) {
      work.logit[item] = view.gate(token(item / p.chunk, item % p.chunk), 0);
    }
    __syncthreads();
  }
};

// Norms of rows value(r), r < kRowsAtOnce. One warp.
template <int kParts, class Value, class Emit>
__device__ inline void norms(Value value, Emit emit) {
  float mine[kRowsAtOnce][kParts];
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) load_lane_row(mine[r], value(r));
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) emit(r, lane_norm(mine[r]), mine[r]);
}

template <class T, int kParts>
__device__ void list_exact(const Row<T>& at) {
  const auto& [p, view, work, row, pinned, evicted] = at;
  const int heads = p.kv_heads;
  const auto to = [&](int h) -> auto& { return at.p.lists.template of<T, kParts * kWarp>(at.row, at.p.kv_heads, h); };
  const int64_t start = evicted + p.window;
  // Candidates are compared with those of the chunk before as well, if that evicts.
  const int both = view.evicts(start - p.chunk) && row > view.span.row0 ? 2 : 1;
  at.load_logits(both);
  // The highest gates above the threshold, ties to the earlier position: four lanes a token.
#pragma unroll 1
  for (int item = threadIdx.x / 4; item < both * p.chunk; item += blockDim.x / 4) {
    const int which = item >= p.chunk, c = item - which * p.chunk;
    const int skip = which == 0 ? pinned : view.sinks_at(start - p.chunk);
    const float *logit = work.logit + which * p.chunk, mine = logit[c];
    int rank = 0;
#pragma unroll 4
    for (int other = lane_id() % 4; other < p.chunk; other += 4) {
      rank += other >= skip && (logit[other] > mine || (logit[other] == mine && other < c));
    }
    const unsigned four = 0xfu << (lane_id() & ~3);
    rank += __shfl_xor_sync(four, rank, 1);
    rank += __shfl_xor_sync(four, rank, 2);
    const bool real = c >= skip && static_cast<double>(mine) >= p.exact_threshold && p.exact_slots > p.num_sinks;
    if (lane_id() % 4 == 0) work.chosen[item] = real && rank < p.exact_candidates;
  }
  __syncthreads();
  if (const int which = warp_id(); which < both) {
    int* const candidate = work.candidate + which * p.chunk;
    const int kept = compact(candidate, p.chunk, [&](int c) { return at.work.chosen[which * at.p.chunk + c]; });
    if (lane_id() < kTileRows) {
      const bool real = lane_id() < kept;
      const int c = kept > 0 ? candidate[min(lane_id(), kept - 1)] : 0, source = at.token(which, c);
      work.source[which * kTileRows + lane_id()] = source;
#pragma unroll 1
      for (int h = 0; h < heads && which == 0; ++h) {
        to(h).source[lane_id()] = real ? source : -1;
        to(h).offset[lane_id()] = real ? c : -1;
      }
    }
    if (lane_id() == 0) work.counts[which] = kept;
  }
  __syncthreads();
  const int count = work.counts[0], compared = count == 0 ? 0 : both == 2 && work.counts[1] > 0 ? 2 : 1;
  if (count == 0) return;
  // All rows at once.
  constexpr int kDim = kParts * kWarp, kPackets = kDim / kPacket;
  T* const values = reinterpret_cast<T*>(work.value);
#pragma unroll 1
  for (int item = threadIdx.x; item < compared * kTileRows * heads * kPackets; item += blockDim.x) {
    const int row = item / kPackets;
    const T* from = view.value(work.source[row / heads], row % heads);
    ampere::copy_packet(values + item * kPacket, from + item % kPackets * kPacket, true);
  }
  ampere::commit_copies();
  ampere::wait_copies<0>();
  __syncthreads();
  const auto value = [&](int which, int i, int h) { return values + ((which * kTileRows + i) * heads + h) * kDim; };
  // Dot products of eight rows with four, and norms of eight rows.
#pragma unroll 1
  for (int item = warp_id(); item < compared * heads * 3; item += warp_count()) {
    const int kind = item % 3, which = item / 3 >= heads, h = item / 3 - which * heads;
    if (kind < 2) {
      const int first = kind * kTileColumns;
      float column[kTileColumns][kParts];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) load_lane_row(column[j], value(which, first + j, h));
      const float dot = tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_lane_row(to, value(0, i, h)); });
      work.dot[which * heads + h][lane_id() / kTileColumns * kTileRows + first + lane_id() % kTileColumns] = dot;
    } else {
      norms<kParts>([&](int r) { return value(which, r, h); }, [&](int r, float x, const float(&mine)[kParts]) {
        if (which == 0) pack_lane_row(to(h).value + r * kParts * kWarp, mine);
        if (lane_id() != 0) return;
        at.work.norm[which * kTileRows + r][h] = x;
        if (which == 0) to(h).norm[r] = x;
      });
    }
  }
  __syncthreads();
  constexpr int pairs = kTileRows * kTileRows;
#pragma unroll 1
  for (int item = threadIdx.x; item < compared * pairs; item += blockDim.x) {
    const int which = item / pairs, pair = item % pairs;
    const float *mine = work.norm[pair / kTileRows], *other = work.norm[which * kTileRows + pair % kTileRows];
    float total = 0.0f;
#pragma unroll 2
    for (int h = 0; h < heads; ++h) total = add_rn(total, div_rn(work.dot[which * heads + h][pair], mul_rn(mine[h], other[h])));
    const uint32_t key = score_key(div_rn(total, static_cast<float>(heads)));
#pragma unroll 1
    for (int h = 0; h < heads; ++h) (which == 0 ? to(h).gram : to(h).before)[pair] = key;
  }
}

// Every block finds who the candidates are, the first one tells; each has a share of their rows.
template <class T, int kParts>
__device__ void list_summary(const Row<T>& at, int split) {
  const auto& [p, view, work, row, pinned, evicted] = at;
  const CandidateLists& lists = p.lists;
  const int heads = p.kv_heads, tokens = lists.tokens;
  at.load_logits(1);
  if (warp_id() == 0) {
    const float* logit = work.logit;
    const double threshold = p.summary_threshold;
    const int count = compact(work.offset, p.chunk, [=, skip = pinned](int c) {
      return c >= skip && static_cast<double>(logit[c]) >= threshold;
    });
#pragma unroll 1
    for (int i = lane_id(); i < tokens; i += kWarp) {
      const int c = i < count ? work.offset[i] : 0;
      if (i < count) work.source[i] = at.token(0, c);
      if (split != 0) continue;
      lists.summary_offset[int64_t{row} * tokens + i] = c;
      lists.summary_gate[int64_t{row} * tokens + i] = i < count ? sigmoid(logit[c]) : 0.0f;
    }
    if (lane_id() == 0) work.counts[0] = count;
  }
  __syncthreads();
  const int count = work.counts[0];
  if (split == 0 && threadIdx.x == 0) lists.summary_count[row] = count;
#pragma unroll 1
  for (int item = threadIdx.x * kSplits + split; item < heads * tokens; item += blockDim.x * kSplits) {
    const int h = item / tokens, i = item - h * tokens;
    const int64_t to = int64_t{row} * heads * tokens + item;
    if (i < count) {
      lists.summary_rows[to] = {view.bank_key(work.source[i], h), view.value(work.source[i], h)};
    } else {
      lists.summary_rows[to] = {p.v, p.v};
      lists.summary_norm[to] = 0.0f;
    }
  }
  const int groups = (count + kRowsAtOnce - 1) / kRowsAtOnce;
#pragma unroll 1
  for (int item = warp_id() * kSplits + split; item < heads * groups; item += warp_count() * kSplits) {
    const int group = item / heads, h = item - group * heads, first = group * kRowsAtOnce;
    float* const to = lists.summary_norm + (int64_t{row} * heads + h) * tokens + first;
    norms<kParts>([&](int r) { return at.view.value(at.work.source[min(first + r, count - 1)], h); },
                  [&](int r, float x, const float(&)[kParts]) {
                    if (lane_id() == 0 && first + r < count) to[r] = x;
                  });
  }
}

// One part of a chunk row. Ends with a barrier and tells that it is there.
template <class T, int kParts>
__device__ void list_part(const BankScan& p, ListShared& work, int row, int part) {
  if (const int j = static_cast<int>(threadIdx.x); part == p.lists.exact_parts && j < p.summary_slots) {  // 64 at most
    p.lists.members[int64_t{row} * p.summary_slots + j] = {0, 0};
  }
  const int64_t n = find_sequence(p.sequences, row, [&](int64_t m) { return row_of(p, m); });
  clear_row<T>(p, n, row, p.lists.parts - 1 - part, p.lists.parts);  // the assignment by one of the summaries' parts
  const ScanView<T> view(p, n);
  const int64_t start = view.span.chunk_start(row - view.span.row0, p.chunk);
  if (row - view.span.row0 < view.span.chunks && view.evicts(start)) {
    const Row<T> at{p, view, work, row, view.sinks_at(start), start - p.window};
    const int split = part - p.lists.exact_parts;
    if (split < 0) {
      list_exact<T, kParts>(at);
      fence_async_global();
    } else {
      list_summary<T, kParts>(at, split);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) store_release(p.lists.flag(row, part), 1);
}

// A block makes one part of every strip-th row of each sequence, in the order in which a scan beside it wants them: the first one
// of all sequences first. `strips` is 1 where all rows count as those of one.
template <class T, int kParts>
__global__ void __launch_bounds__(kMostThreads, 1) list_candidates_kernel(ListCandidates p) {
  extern __shared__ __align__(16) unsigned char shared[];
  ListShared& work = *reinterpret_cast<ListShared*>(shared);
  wait_for_stream();
  const int parts = p.lists.parts, part = static_cast<int>(blockIdx.x) % parts, mine = static_cast<int>(blockIdx.x) / parts;
  const int rows = mine < p.strip ? static_cast<int>(p.chunk_rows) : 0;  // of blocks that are left over, none
  const auto first_row = [&](int n) { return static_cast<int>(n == 0 ? 0 : n == p.strips ? rows : row_of(p, n)); };
  if (p.beside) {
#pragma unroll 1
    for (int n = 0; n < p.strips; ++n) {
#pragma unroll 1
      for (int row = first_row(n) + mine + threadIdx.x * p.strip, end = min(first_row(n + 1), rows); row < end;
           row += blockDim.x * p.strip) {
        store_release(p.lists.flag(row, part), 0);
      }
    }
    __threadfence();
    __syncthreads();
    let_next_start();
  }
#pragma unroll 1
  for (int from = mine; from < rows; from += p.strip) {
#pragma unroll 1
    for (int n = 0; n < p.strips; ++n) {
      if (const int row = first_row(n) + from; row < first_row(n + 1)) list_part<T, kParts>(p, work, row, part);
    }
  }
  if (p.copies) {
#pragma unroll 1
    for (int i = blockIdx.x; i < p.ring_parts; i += gridDim.x) copy_ring_part<T>(p, i, 1, p.wide);
  }
  __threadfence();  // the next kernel, which starts when this one ends, may ask for nothing but the flags
}

}  // namespace

cudaError_t list_candidates(const BankScan& scan, DType dtype, int clusters, int blocks, cudaStream_t stream) {
  ListCandidates p{scan, 0, 0, false, 0};
  p.beside = clusters * blocks >= p.lists.parts;
  p.strip = static_cast<int>(p.beside ? clusters * blocks / p.lists.parts : p.chunk_rows);
  p.strips = static_cast<int>(p.beside ? p.sequences : 1);
  p.ring_parts = static_cast<int>(ring_parts(p, (p.beside ? kMostThreads : kThreads) / kWarp, 1));
  const auto by_dim = [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = p.dim == 64 ? list_candidates_kernel<T, 2> : list_candidates_kernel<T, 4>;
    if (p.beside) return launch_clusters(kernel, clusters, blocks, kMostThreads, kWholeShared, stream, p);
    const dim3 grid(static_cast<unsigned>(p.chunk_rows * p.lists.parts));
    return launch_early(kernel, grid, kThreads, sizeof(ListShared), stream, p);
  };
  return dtype == DType::kBFloat16 ? by_dim(__nv_bfloat16{}) : by_dim(__half{});
}

}  // namespace coda::kernels::sm90
