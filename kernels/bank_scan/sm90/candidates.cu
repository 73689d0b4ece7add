#include "candidates.cuh"

#include "../../common/sequences.cuh"

namespace coda::kernels::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = kTileRows;  // rows of a warp whose loads are underway together
constexpr int kSplits = 4;      // blocks that share the summary list of a chunk row

struct Layout {
  float* logit;     // (2, C) of this chunk, then of the one before
  int* candidate;   // (2, C) offsets of the exact bank's
  int* offset;      // (C) offsets of the summary bank's
  int* source;      // (C) their flat sources; (2, 8) of the exact bank's, the last one repeated
  float* norm;      // (Hkv, 2, 8)
  float* cosine;    // (Hkv, 2, 64) of this chunk's with each other, then with those before

  __host__ __device__ Layout(Carver& carver, const BankScanParams& p)
      : logit(carver.take<float>(2 * p.chunk)), candidate(carver.take<int>(2 * p.chunk)), offset(carver.take<int>(p.chunk)),
        source(carver.take<int>(p.chunk < 2 * kTileRows ? 2 * kTileRows : p.chunk)),
        norm(carver.take<float>(p.kv_heads * 2 * kTileRows)),
        cosine(carver.take<float>(p.kv_heads * 2 * kTileRows * kTileRows)) {}
};

// What both lists begin with: a chunk row that evicts. Loops are kept short, since most of such a block's time goes to fetching
// code that runs once.
template <class T>
struct Row {
  const BankScan& p;
  const ScanView<T> view;
  const Layout& work;
  int64_t row, evicted;  // first position that leaves the ring
  int pinned;            // sinks among those

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
  __shared__ int counts[2];
  const auto& [p, view, work, row, evicted, pinned] = at;
  const int heads = p.kv_heads;
  const auto to = [&](int h) -> auto& { return at.p.lists.template of<T, kParts * kWarp>(at.row, at.p.kv_heads, h); };
  const int64_t start = evicted + p.window;
  // Candidates are compared with those of the chunk before as well, if that evicts.
  const int both = view.evicts(start - p.chunk) && row > view.span.row0 ? 2 : 1;
  at.load_logits(both);
  if (const int which = warp_id(); which < both) {
    // The highest gates above the threshold, ties to the earlier position.
    const float* logit = work.logit + which * p.chunk;
    int* candidate = work.candidate + which * p.chunk;
    const int skip = which == 0 ? pinned : view.sinks_at(start - p.chunk), chunk = p.chunk, most = p.exact_candidates;
    const double threshold = p.exact_threshold;
    const int kept = p.exact_slots == p.num_sinks ? 0 : compact(candidate, chunk, [=](int c) {
      const float mine = logit[c];
      if (c < skip || !(static_cast<double>(mine) >= threshold)) return false;
      int rank = 0;
#pragma unroll 4
      for (int other = skip; other < chunk; ++other) {
        rank += logit[other] > mine || (logit[other] == mine && other < c);
      }
      return rank < most;
    });
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
    if (lane_id() == 0) counts[which] = kept;
  }
  __syncthreads();
  const int count = counts[0], compared = count == 0 ? 0 : both == 2 && counts[1] > 0 ? 2 : 1;
  const auto value = [&](int which, int i, int h) {
    return at.view.value(at.work.source[which * kTileRows + i], h);
  };
#pragma unroll 1
  for (int item = warp_id(); item < compared * heads; item += warp_count()) {
    const int which = item >= heads, h = item - which * heads;
    float* const norm = work.norm + (h * 2 + which) * kTileRows;
    norms<kParts>([&](int r) { return value(which, r, h); }, [&](int r, float x, const float(&mine)[kParts]) {
      if (which == 0) pack_lane_row(to(h).value + r * kParts * kWarp, mine);
      if (lane_id() != 0) return;
      norm[r] = x;
      if (which == 0) to(h).norm[r] = x;
    });
  }
  if (count == 0) return;
  __syncthreads();
#pragma unroll 1
  for (int item = warp_id(); item < compared * heads * 2; item += warp_count()) {
    const int which = item / (heads * 2), h = item / 2 % heads, first = item % 2 * kTileColumns;
    float column[kTileColumns][kParts];
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) load_lane_row(column[j], value(which, first + j, h));
    const float dot = tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_lane_row(to, value(0, i, h)); });
    const int i = lane_id() / kTileColumns, j = first + lane_id() % kTileColumns;
    const float *mine = work.norm + h * 2 * kTileRows, *other = mine + which * kTileRows;
    work.cosine[((h * 2 + which) * kTileRows + i) * kTileRows + j] = div_rn(dot, mul_rn(mine[i], other[j]));
  }
  __syncthreads();
  constexpr int pairs = kTileRows * kTileRows;
#pragma unroll 1
  for (int item = threadIdx.x; item < compared * pairs; item += blockDim.x) {
    float total = 0.0f;
    for (int h = 0; h < heads; ++h) total = add_rn(total, work.cosine[h * 2 * pairs + item]);
    const uint32_t key = score_key(div_rn(total, static_cast<float>(heads)));
#pragma unroll 1
    for (int h = 0; h < heads; ++h) (item < pairs ? to(h).gram : to(h).before)[item % pairs] = key;
  }
}

// Every block finds who the candidates are, the first one tells; each has a share of their rows.
template <class T, int kParts>
__device__ void list_summary(const Row<T>& at, int split) {
  __shared__ int kept;
  const auto& [p, view, work, row, evicted, pinned] = at;
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
      lists.summary_offset[row * tokens + i] = c;
      lists.summary_gate[row * tokens + i] = i < count ? sigmoid(logit[c]) : 0.0f;
    }
    if (lane_id() == 0) kept = count;
  }
  __syncthreads();
  const int count = kept;
  if (split == 0 && threadIdx.x == 0) lists.summary_count[row] = count;
#pragma unroll 1
  for (int item = threadIdx.x * kSplits + split; item < heads * tokens; item += blockDim.x * kSplits) {
    const int h = item / tokens, i = item - h * tokens;
    const int64_t to = row * heads * tokens + item;
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
    float* const to = lists.summary_norm + (row * heads + h) * tokens + first;
    norms<kParts>([&](int r) { return at.view.value(at.work.source[min(first + r, count - 1)], h); },
                  [&](int r, float x, const float(&)[kParts]) {
                    if (lane_id() == 0 && first + r < count) to[r] = x;
                  });
  }
}

// Blocks of a chunk row: one for the exact bank's list, then those of the summary bank's.
template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 3) list_candidates_kernel(BankScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  wait_for_stream();
  let_next_start();
  const int64_t row = blockIdx.x;
  const ScanView<T> view(p, find_sequence(p.sequences, row, [&](int64_t m) { return p.cu_seqlens[m] / p.chunk + 2 * m; }));
  const int64_t start = view.span.chunk_start(row - view.span.row0, p.chunk);
  if (row - view.span.row0 >= view.span.chunks || !view.evicts(start)) return;
  Carver carver(shared);
  const Layout work(carver, p);
  const Row<T> at{p, view, work, row, start - p.window, view.sinks_at(start)};
  const int split = static_cast<int>(blockIdx.y) - p.banks.exact;
  if (split < 0) {
    list_exact<T, kParts>(at);
  } else {
    list_summary<T, kParts>(at, split);
  }
}

}  // namespace

cudaError_t list_candidates(const BankScan& p, DType dtype, cudaStream_t stream) {
  Carver sizes(nullptr);
  Layout(sizes, p);
  const auto by_dim = [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>(p.chunk_rows), p.banks.exact + (p.banks.summary ? kSplits : 0));
    const auto kernel = p.dim == 64 ? list_candidates_kernel<T, 2> : list_candidates_kernel<T, 4>;
    return launch_early(kernel, grid, kThreads, sizes.used(), stream, p);
  };
  return dtype == DType::kBFloat16 ? by_dim(__nv_bfloat16{}) : by_dim(__half{});
}

}  // namespace coda::kernels::sm90
