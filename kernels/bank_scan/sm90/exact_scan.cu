#include "../new_state.cuh"
#include "exact_scan.cuh"

namespace coda::kernels::sm90 {
namespace {

template <class T, int kParts>
__global__ void __launch_bounds__(kScanThreads) exact_scan_kernel(BankScan p) {
  using Scan = ExactScan<T, kParts, 2>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barriers[Scan::kBarriers];
  let_next_start();
  follow_lists(p.lists);
  const int64_t n = blockIdx.x / (p.kv_heads * 2);
  Scan(p, n, shared, barriers).run();
  // Slots of this block's head in the new state.
  const int head = cluster_rank() / 2, part = cluster_rank() % 2;
#pragma unroll 1
  for (int j = part + warp_id() * 2; j < p.exact_slots; j += warp_count() * 2) {
    const int from = p.source[n * p.exact_slots + j], slot = p.window + j;
    copy_slots<T, true>(p, ScanView<T>(p, n), head, slot, 1, [&](int) { return from < 0 ? slot : from; }, p.wide, p.inv_freq);
  }
  wait_for_stream();  // for the sake of the kernels that follow
}

}  // namespace

ScanKernel exact_scan_in_halves(int dim, DType dtype) {
  const auto of = [&](auto zero) -> ScanKernel {
    using T = decltype(zero);
    return dim == 64 ? exact_scan_kernel<T, 2> : exact_scan_kernel<T, 4>;
  };
  return dtype == DType::kBFloat16 ? of(__nv_bfloat16{}) : of(__half{});
}

}  // namespace coda::kernels::sm90
