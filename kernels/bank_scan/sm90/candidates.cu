#include "candidates.cuh"

#include "../../common/sequences.cuh"

namespace coda::kernels::sm90 {
namespace {

constexpr int kThreads = 512;
constexpr int kRowsAtOnce = 4;  // rows of a warp whose loads are underway together

struct Layout {
  float* logit;     // (C)
  int* candidate;   // (C) offsets of the exact bank's
  int* offset;      // (C) offsets of the summary bank's
  int* source;      // (C) their flat sources
  float* norm;      // (Hkv, 8)
  float* cosine;    // (Hkv, 2, 32)

  __host__ __device__ Layout(Carver& carver, const BankScanParams& p)
      : logit(carver.take<float>(p.chunk)), candidate(carver.take<int>(p.chunk)), offset(carver.take<int>(p.chunk)),
        source(carver.take<int>(p.chunk)), norm(carver.take<float>(p.kv_heads * kTileRows)),
        cosine(carver.take<float>(p.kv_heads * kTileRows * kTileRows)) {}
};

// One block for each chunk row.
template <class T, int kParts>
__global__ void __launch_bounds__(kThreads) list_candidates_kernel(BankScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int exact_count, summary_count;
  const int64_t row = blockIdx.x;
  const ScanView<T> view(p, find_sequence(p.sequences, row, [&](int64_t m) { return p.cu_seqlens[m] / p.chunk + 2 * m; }));
  const int64_t start = view.span.chunk_start(row - view.span.row0, p.chunk), evicted = start - p.window;
  if (row - view.span.row0 >= view.span.chunks || !view.evicts(start)) return;
  Carver carver(shared), global(p.workspace);
  const Layout work(carver, p);
  const CandidateLists lists(global, p, p.banks);
  const int pinned = view.sinks_at(start), heads = p.kv_heads;
  const auto to = [&](int h) -> auto& { return lists.of<T, kParts * kWarp>(row, heads, h); };
  for (int c = threadIdx.x; c < p.chunk; c += blockDim.x) work.logit[c] = view.gate(view.source_of(evicted + c), 0);
  __syncthreads();
  if (warp_id() == 0 && p.banks.exact) {
    // The highest gates above the threshold, ties to the earlier position.
    const int kept = p.exact_slots == p.num_sinks ? 0 : compact(work.candidate, p.chunk, [&](int c) {
      const float mine = work.logit[c];
      if (c < pinned || !(static_cast<double>(mine) >= p.exact_threshold)) return false;
      int rank = 0;
#pragma unroll 8
      for (int other = pinned; other < p.chunk; ++other) {
        rank += work.logit[other] > mine || (work.logit[other] == mine && other < c);
      }
      return rank < p.exact_candidates;
    });
    if (lane_id() < kTileRows) {
      const int c = lane_id() < kept ? work.candidate[lane_id()] : -1, source = c < 0 ? -1 : view.source_of(evicted + c);
      for (int h = 0; h < heads; ++h) {
        to(h).source[lane_id()] = source;
        to(h).offset[lane_id()] = c;
      }
    }
    if (lane_id() == 0) exact_count = kept;
  }
  if (warp_id() == 1 && p.banks.summary) {
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
  const int exact = p.banks.exact ? exact_count : 0;
  const auto exact_value = [&](int i, int h) {
    return view.value(view.source_of(evicted + work.candidate[min(i, exact - 1)]), h);
  };
  for (int item = warp_id(); exact > 0 && item < heads * kTileRows; item += warp_count()) {
    const int h = item / kTileRows, i = item % kTileRows;
    float mine[kParts];
    load_lane_row(mine, exact_value(i, h));
    const float norm = lane_norm(mine);
    pack_lane_row(to(h).value + i * kParts * kWarp, mine);
    if (lane_id() == 0) work.norm[item] = to(h).norm[i] = norm;
  }
  const int count = p.banks.summary ? summary_count : 0;
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
  for (int item = warp_id(); item < heads * 2; item += warp_count()) {
    const int h = item / 2, first = item % 2 * kTileColumns;
    float column[kTileColumns][kParts];
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) load_lane_row(column[j], exact_value(first + j, h));
    const float dot = tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_lane_row(to, exact_value(i, h)); });
    const int i = lane_id() / kTileColumns, j = first + lane_id() % kTileColumns;
    work.cosine[h * kTileRows * kTileRows + i * kTileRows + j] =
        div_rn(dot, mul_rn(work.norm[h * kTileRows + i], work.norm[h * kTileRows + j]));
  }
  __syncthreads();
  for (int item = threadIdx.x; item < kTileRows * kTileRows; item += blockDim.x) {
    float total = 0.0f;
    for (int h = 0; h < heads; ++h) total = add_rn(total, work.cosine[h * kTileRows * kTileRows + item]);
    const uint32_t key = score_key(div_rn(total, static_cast<float>(heads)));
    for (int h = 0; h < heads; ++h) to(h).gram[item] = key;
  }
}

}  // namespace

cudaError_t list_candidates(const BankScan& p, DType dtype, cudaStream_t stream) {
  Carver sizes(nullptr);
  Layout(sizes, p);
  const auto by_dim = [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = p.dim == 64 ? list_candidates_kernel<T, 2> : list_candidates_kernel<T, 4>;
    return launch(kernel, dim3(static_cast<unsigned>(p.chunk_rows)), kThreads, sizes.used(), stream, p);
  };
  return dtype == DType::kBFloat16 ? by_dim(__nv_bfloat16{}) : by_dim(__half{});
}

}  // namespace coda::kernels::sm90
