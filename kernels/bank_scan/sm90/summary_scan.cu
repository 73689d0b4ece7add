#include "summary_scan.cuh"

namespace coda::kernels::sm90 {
namespace {

template <class T, int kParts>
__global__ void __launch_bounds__(kScanThreads) summary_scan_kernel(BankScan p) {
  using Scan = SummaryScan<T, kParts, 2>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barriers[Scan::kBarriers];
  let_next_start();
  follow_lists(p.lists);
  Scan(p, blockIdx.x / (p.kv_heads * 2), shared, barriers).run();
  wait_for_stream();  // for the sake of the kernels that follow
}

}  // namespace

ScanKernel summary_scan_in_halves(int dim, DType dtype) {
  const auto of = [&](auto zero) -> ScanKernel {
    using T = decltype(zero);
    return dim == 64 ? summary_scan_kernel<T, 2> : summary_scan_kernel<T, 4>;
  };
  return dtype == DType::kBFloat16 ? of(__nv_bfloat16{}) : of(__half{});
}

}  // namespace coda::kernels::sm90
