#include "candidates.cuh"

#include "../../common/sequences.cuh"

namespace coda::kernels::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kRowsAtOnce = 4;  // rows of a warp whose loads are underway together

struct Layout {
  float* logit;     // (2, C) of this chunk, then of the one before
  int* candidate;   // (2, C) offsets of the exact bank's
  int* offset;      // (C) offsets of the summary bank's
  int* source;      // (C) their flat sources
  float* norm;      // (Hkv, 2, 8)
  float* cosine;    // (Hkv, 2, 64) of this chunk's with each other, then with those before

  __host__ __device__ Layout(Carver& carver, const BankScanParams& p)
      : logit(carver.take<float>(2 * p.chunk)), candidate(carver.take<int>(2 * p.chunk)), offset(carver.take<int>(p.chunk)),
        source(carver.take<int>(p.chunk)), norm(carver.take<float>(p.kv_heads * 2 * kTileRows)),
        cosine(carver.take<float>(p.kv_heads * 2 * kTileRows * kTileRows)) {}
};

// One block for each chunk row. Each bank's lists have a launch of their own: those of the summary bank, mostly reading, need few
// registers, so that more of their blocks run at once.
template <class T, int kParts, bool kExact>
__global__ void __launch_bounds__(kThreads, kExact ? 1 : 2) list_candidates_kernel(BankScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int exact_count[2], summary_count;
  const int64_t row = blockIdx.x;
  const ScanView<T> view(p, find_sequence(p.sequences, row, [&](int64_t m) { return p.cu_seqlens[m] / p.chunk + 2 * m; }));
  const int64_t start = view.span.chunk_start(row - view.span.row0, p.chunk), evicted = start - p.window;
  if (row - view.span.row0 >= view.span.chunks || !view.evicts(start)) return;
  Carver carver(shared);
  const Layout work(carver, p);
  const CandidateLists& lists = p.lists;
  const int pinned = view.sinks_at(start), heads = p.kv_heads;
  const auto to = [&](int h) -> auto& { return lists.of<T, kParts * kWarp>(row, heads, h); };
  // The exact bank's candidates are compared with those of the chunk before as well, if that evicts.
  const int both = kExact && view.evicts(start - p.chunk) && row > view.span.row0 ? 2 : 1;
  const auto token = [&](int which, int c) { return view.source_of(evicted - which * p.chunk + c); };
  for (int item = threadIdx.x; item < both * p.chunk; item += blockDim.x) {
    work.logit[item] = view.gate(token(item / p.chunk, item % p.chunk), 0);
  }
  __syncthreads();
  if (const int which = warp_id(); which < both && kExact) {
    // The highest gates above the threshold, ties to the earlier position.
    const float* logit = work.logit + which * p.chunk;
    int* candidate = work.candidate + which * p.chunk;
    const int skip = which == 0 ? pinned : view.sinks_at(start - p.chunk);
    const int kept = p.exact_slots == p.num_sinks ? 0 : compact(candidate, p.chunk, [&](int c) {
      const float mine = logit[c];
      if (c < skip || !(static_cast<double>(mine) >= p.exact_threshold)) return false;
      int rank = 0;
#pragma unroll 8
      for (int other = skip; other < p.chunk; ++other) {
        rank += logit[other] > mine || (logit[other] == mine && other < c);
      }
      return rank < p.exact_candidates;
    });
    if (which == 0 && lane_id() < kTileRows) {
      const int c = lane_id() < kept ? candidate[lane_id()] : -1, source = c < 0 ? -1 : view.source_of(evicted + c);
      for (int h = 0; h < heads; ++h) {
        to(h).source[lane_id()] = source;
        to(h).offset[lane_id()] = c;
      }
    }
    if (lane_id() == 0) exact_count[which] = kept;
  }
  if (warp_id() == 0 && !kExact) {
    const int kept = compact(work.offset, p.chunk, [&](int c) {
      return c >= pinned && static_cast<double>(work.logit[c]) >= p.summary_threshold;
    });
    for (int i = lane_id(); i < kept; i += kWarp) {
      const int c = work.offset[i], source = view.source_of(evicted + c);
      work.source[i] = source;
      lists.summary_offset[row * lists.tokens + i] = c;
      lists.summary_gate[row * lists.tokens + i] = sigmoid(work.logit[c]);
    }
    for (int i = lane_id(); i < heads * lists.tokens; i += kWarp) {
      if (i % lists.tokens >= kept) lists.summary_rows[row * heads * lists.tokens + i] = {};
    }
    if (lane_id() == 0) lists.summary_count[row] = summary_count = kept;
  }
  __syncthreads();
  const int exact = kExact ? exact_count[0] : 0;
  const int compared = exact == 0 ? 0 : both == 2 && exact_count[1] > 0 ? 2 : 1;
  const auto exact_value = [&](int which, int i, int h) {
    return view.value(token(which, work.candidate[which * p.chunk + min(i, exact_count[which] - 1)]), h);
  };
  for (int item = warp_id(); item < compared * heads * kTileRows; item += warp_count()) {
    const int which = item / (heads * kTileRows), h = item / kTileRows % heads, i = item % kTileRows;
    float mine[kParts];
    load_lane_row(mine, exact_value(which, i, h));
    const float norm = lane_norm(mine);
    if (which == 0) pack_lane_row(to(h).value + i * kParts * kWarp, mine);
    if (lane_id() != 0) continue;
    work.norm[(h * 2 + which) * kTileRows + i] = norm;
    if (which == 0) to(h).norm[i] = norm;
  }
  const int count = kExact ? 0 : summary_count;
  for (int item = warp_id() * kRowsAtOnce; item < heads * count; item += warp_count() * kRowsAtOnce) {
    float mine[kRowsAtOnce][kParts];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int at = min(item + r, heads * count - 1);
      load_lane_row(mine[r], view.value(work.source[at / heads], at % heads));
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float norm = lane_norm(mine[r]);
      const int i = (item + r) / heads, h = (item + r) % heads;
      if (lane_id() != 0 || i >= count) continue;
      const int64_t at = (row * heads + h) * lists.tokens + i;
      lists.summary_norm[at] = norm;
      lists.summary_rows[at] = {view.bank_key(work.source[i], h), view.value(work.source[i], h)};
    }
  }
  if (exact == 0) return;
  __syncthreads();
  for (int item = warp_id(); item < compared * heads * 2; item += warp_count()) {
    const int which = item / (heads * 2), h = item / 2 % heads, first = item % 2 * kTileColumns;
    float column[kTileColumns][kParts];
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) load_lane_row(column[j], exact_value(which, first + j, h));
    const float dot = tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_lane_row(to, exact_value(0, i, h)); });
    const int i = lane_id() / kTileColumns, j = first + lane_id() % kTileColumns;
    const float *mine = work.norm + h * 2 * kTileRows, *other = mine + which * kTileRows;
    work.cosine[((h * 2 + which) * kTileRows + i) * kTileRows + j] = div_rn(dot, mul_rn(mine[i], other[j]));
  }
  __syncthreads();
  constexpr int pairs = kTileRows * kTileRows;
  for (int item = threadIdx.x; item < compared * pairs; item += blockDim.x) {
    float total = 0.0f;
    for (int h = 0; h < heads; ++h) total = add_rn(total, work.cosine[h * 2 * pairs + item]);
    const uint32_t key = score_key(div_rn(total, static_cast<float>(heads)));
    for (int h = 0; h < heads; ++h) (item < pairs ? to(h).gram : to(h).before)[item % pairs] = key;
  }
}

}  // namespace

cudaError_t list_candidates(const BankScan& p, DType dtype, cudaStream_t stream) {
  Carver sizes(nullptr);
  Layout(sizes, p);
  const auto by_dim = [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>(p.chunk_rows));
    const auto exact = p.dim == 64 ? list_candidates_kernel<T, 2, true> : list_candidates_kernel<T, 4, true>;
    const auto summary = p.dim == 64 ? list_candidates_kernel<T, 2, false> : list_candidates_kernel<T, 4, false>;
    const auto status = p.banks.exact ? launch(exact, grid, kThreads, sizes.used(), stream, p) : cudaSuccess;
    if (status != cudaSuccess || !p.banks.summary) return status;
    return launch(summary, grid, kThreads, sizes.used(), stream, p);
  };
  return dtype == DType::kBFloat16 ? by_dim(__nv_bfloat16{}) : by_dim(__half{});
}

}  // namespace coda::kernels::sm90
