#include "../common/launch.cuh"
#include "novelty.cuh"
#include "scan_view.cuh"
#include "steps.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;

template <class A>
struct Layout {
  NoveltyBank<A> bank;
  int64_t* position;  // (Me)
  int* source;        // (Me)
  A* logit;           // (C) of the evicted tokens
  int* candidate;     // (C) offsets among the evicted tokens

  __host__ __device__ Layout(Carver& carver, const BankScanParams& p)
      : bank(carver, p.exact_slots, p.exact_candidates < p.chunk ? p.exact_candidates : p.chunk, p.kv_heads),
        position(carver.take<int64_t>(p.exact_slots)), source(carver.take<int>(p.exact_slots)),
        logit(carver.take<A>(p.chunk)), candidate(carver.take<int>(p.chunk)) {}
};

template <class A>
size_t layout_bytes(const BankScanParams& p) {
  Carver sizes(nullptr);
  Layout<A>(sizes, p);
  return sizes.used();
}

// One block walks the chunks of one sequence, all KV heads together.
template <class T>
__global__ void __launch_bounds__(kThreads) novelty_kernel(BankScanForward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int candidates;
  const int slots = p.exact_slots, sinks = p.num_sinks;
  Carver sizes(nullptr);
  Layout<A>(sizes, p);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const Layout<A> work(carver, p);
  const auto& bank = work.bank;
  const ScanView<T> view(p, blockIdx.x);
  const NoveltyRule rule{slots, sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};

  const auto used = [&](int j) { return bank.occupant[j] != NoveltyBank<A>::kFree; };
  const auto slot_value = [&](int j, int h) { return view.value(work.source[j], h); };
  const auto every = [](int) { return true; };
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    const int64_t position = p.exact_pos[view.n * slots + j];
    work.position[j] = position;
    work.source[j] = p.window + j;
    bank.occupant[j] = position < 0 ? NoveltyBank<A>::kFree : NoveltyBank<A>::kHeld;
    bank.last_touch[j] = p.last_touch[view.n * slots + j];
  }
  __syncthreads();
  row_norms(bank.slot_norm, slots, p.kv_heads, p.dim, used, slot_value, every);
  int64_t inserts = 0, hits = 0;
  for (int64_t i = 0; i < view.span.chunks; ++i) {
    __syncthreads();
    const int64_t start = view.span.chunk_start(i, p.chunk);
    if (view.evicts(start)) {
      const int64_t evicted = start - p.window;
      const int pinned = view.sinks_at(start);
      for (int c = threadIdx.x; c < p.chunk; c += blockDim.x) {
        const int64_t position = evicted + c;
        const int source = view.source_of(position);
        work.logit[c] = view.gate(source, 0);
        if (c < pinned) {
          work.position[position] = bank.last_touch[position] = position;
          work.source[position] = source;
          bank.occupant[position] = NoveltyBank<A>::kHeld;
        }
      }
      __syncthreads();
      row_norms(bank.slot_norm, slots, p.kv_heads, p.dim,
                [&](int j) { return j >= evicted && j < evicted + pinned; }, slot_value, every);
      if (warp_id() == 0) {
        // The highest gates above the threshold, ties to the earlier position.
        const int kept = slots == sinks ? 0 : compact(work.candidate, p.chunk, [&](int c) {
          const A mine = work.logit[c];
          if (c < pinned || !(static_cast<double>(mine) >= p.exact_threshold)) return false;
          int rank = 0;
          for (int other = pinned; other < p.chunk; ++other) {
            rank += work.logit[other] > mine || (work.logit[other] == mine && other < c);
          }
          return rank < p.exact_candidates;
        });
        if (lane_id() == 0) candidates = kept;
      }
      __syncthreads();
      const int kept = candidates;
      const auto token = [&](int k) { return evicted + work.candidate[k]; };
      score_candidates(bank, slots, kept, p.kv_heads, p.dim, slot_value,
                       [&](int k, int h) { return view.value(view.source_of(token(k)), h); });
      if (warp_id() == 0) {
        inserts += pinned;
        route_in_order(bank, rule, kept, token, [&](int, int, RouteAction action) {
          if (action == kInsert) {
            ++inserts;
          } else {
            ++hits;
          }
        });
      }
      __syncthreads();
      for (int item = threadIdx.x; item < slots * p.kv_heads; item += blockDim.x) {
        const int occupant = bank.occupant[item / p.kv_heads];
        if (occupant >= 0) bank.slot_norm[item] = bank.candidate_norm[occupant * p.kv_heads + item % p.kv_heads];
      }
      __syncthreads();
      for (int j = threadIdx.x; j < slots; j += blockDim.x) {
        const int occupant = bank.occupant[j];
        if (occupant < 0) continue;
        work.position[j] = token(occupant);
        work.source[j] = view.source_of(work.position[j]);
        bank.occupant[j] = NoveltyBank<A>::kHeld;
      }
      __syncthreads();
    }
    for (int j = threadIdx.x; j < slots; j += blockDim.x) p.index[view.index_row(i, 0) + j] = used(j) ? work.source[j] : -1;
  }
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    p.source[view.n * slots + j] = used(j) ? work.source[j] : -1;
    p.new_exact_pos[view.n * slots + j] = work.position[j];
    p.new_last_touch[view.n * slots + j] = bank.last_touch[j];
  }
  if (threadIdx.x == 0) write_counts(p, view.n, inserts, hits);
}

size_t layout_bytes(const BankScanParams& p, DType dtype) {
  return dtype == DType::kFloat64 ? layout_bytes<double>(p) : layout_bytes<float>(p);
}

}  // namespace

size_t novelty_scan_workspace(const BankScanParams& params, DType dtype) {
  return workspace_part(layout_bytes(params, dtype), params.sequences);
}

cudaError_t novelty_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    return launch(novelty_kernel<decltype(zero)>, dim3(static_cast<unsigned>(params.sequences)), kThreads,
                  shared_part(layout_bytes(params, dtype)), stream, params);
  });
}

}  // namespace coda::kernels
