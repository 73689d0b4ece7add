#include "../common/launch.cuh"
#include "scan_view.cuh"
#include "steps.h"
#include "summary.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;

// One block walks the chunks of one sequence; each chunk's snapshot is built from the one before it.
template <class T>
__global__ void __launch_bounds__(kThreads) summary_kernel(BankScanForward p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int slots = p.summary_slots;
  Carver sizes(nullptr);
  SummaryBank<A>(sizes, slots, p.chunk, p.kv_heads);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const SummaryBank<A> bank(carver, slots, p.chunk, p.kv_heads);
  const ScanView<T> view(p, blockIdx.x);
  const SummaryRule rule{slots, p.kv_heads, p.dim, p.summary_threshold, p.tau_spawn, p.low_freq_key, p.rope_interleaved};

  const A* carried_mass = static_cast<const A*>(p.state_summary_mass) + view.n * slots;
  for (int j = threadIdx.x; j < slots; j += blockDim.x) bank.mass[j] = carried_mass[j];
  const A *before_k = static_cast<const A*>(p.state_summary_k), *before_v = static_cast<const A*>(p.state_summary_v);
  int64_t before = view.n;
  for (int64_t i = 0; i < view.span.chunks; ++i) {
    __syncthreads();
    const int64_t start = view.span.chunk_start(i, p.chunk), row = view.span.row0 + i;
    A *after_k = static_cast<A*>(p.summary_k), *after_v = static_cast<A*>(p.summary_v);
    if (view.evicts(start)) {
      const int64_t evicted = start - p.window;
      summarise(
          bank, rule, static_cast<const A*>(p.eta_logit), view.sinks_at(start), p.chunk,
          [&](int c) { return view.gate(view.source_of(evicted + c), 0); },
          [&](int c, int h) { return view.bank_key(view.source_of(evicted + c), h); },
          [&](int c, int h) { return view.value(view.source_of(evicted + c), h); },
          [&](int j, int h) { return before_k + view.summary_row(before, h, j); },
          [&](int j, int h) { return before_v + view.summary_row(before, h, j); },
          [&](int j, int h) { return after_k + view.summary_row(row, h, j); },
          [&](int j, int h) { return after_v + view.summary_row(row, h, j); },
          [&](int c, int slot) { p.assignment[row * p.chunk + c] = slot; });
    } else {
      for (int item = threadIdx.x; item < p.kv_heads * slots * p.dim; item += blockDim.x) {
        const bool used = bank.mass[item / p.dim % slots] > A(0);
        const int64_t from = view.summary_row(before, 0, 0) + item, to = view.summary_row(row, 0, 0) + item;
        after_k[to] = used ? before_k[from] : A(0);
        after_v[to] = used ? before_v[from] : A(0);
      }
    }
    for (int j = threadIdx.x; j < slots; j += blockDim.x) static_cast<A*>(p.summary_mass)[row * slots + j] = bank.mass[j];
    before_k = after_k;
    before_v = after_v;
    before = row;
  }
  __syncthreads();
  for (int item = threadIdx.x; item < p.kv_heads * slots * p.dim; item += blockDim.x) {
    const int64_t from = view.summary_row(before, 0, 0) + item, to = view.summary_row(view.n, 0, 0) + item;
    static_cast<A*>(p.new_summary_k)[to] = before_k[from];
    static_cast<A*>(p.new_summary_v)[to] = before_v[from];
  }
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    static_cast<A*>(p.new_summary_mass)[view.n * slots + j] = bank.mass[j];
  }
}

size_t layout_bytes(const BankScanParams& p, DType dtype) {
  Carver sizes(nullptr);
  if (dtype == DType::kFloat64) {
    SummaryBank<double>(sizes, p.summary_slots, p.chunk, p.kv_heads);
  } else {
    SummaryBank<float>(sizes, p.summary_slots, p.chunk, p.kv_heads);
  }
  return sizes.used();
}

}  // namespace

size_t summary_scan_workspace(const BankScanParams& params, DType dtype) {
  return workspace_part(layout_bytes(params, dtype), params.sequences);
}

cudaError_t summary_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    return launch(summary_kernel<decltype(zero)>, dim3(static_cast<unsigned>(params.sequences)), kThreads,
                  shared_part(layout_bytes(params, dtype)), stream, params);
  });
}

}  // namespace coda::kernels
