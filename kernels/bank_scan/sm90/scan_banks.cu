#include "../new_state.cuh"
#include "exact_scan.cuh"
#include "summary_scan.cuh"

#include <algorithm>

namespace coda::kernels::sm90 {
namespace {

constexpr int kBarriers = 6;

// The clusters of the summary bank, which take longer, come first; then those of the exact bank, one of each for each sequence.
template <class T, int kParts>
__global__ void __launch_bounds__(kScanThreads) scan_banks_kernel(BankScan p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barriers[kBarriers];
  let_next_start();
  follow_lists(p.lists);
  const int64_t cluster = blockIdx.x / p.kv_heads, summaries = p.banks.summary ? p.sequences : 0;
  if (cluster < summaries) {
    SummaryScan<T, kParts, 1>(p, cluster, shared, barriers).run();
  } else {
    ExactScan<T, kParts, 1>(p, cluster - summaries, shared, barriers).run();
  }
  wait_for_stream();  // for the sake of the kernels that follow
}

size_t exact_bytes(int dim) {
  using T = __nv_bfloat16;  // layouts are those of float16
  return dim == 64 ? sizeof(ExactShared<T, 64>) : sizeof(ExactShared<T, 128>);
}
size_t summary_bytes(int dim, int heads, int blocks) {
  using T = __nv_bfloat16;
  return dim == 64 ? SummaryShared<T, 64>::bytes(heads, blocks) : SummaryShared<T, 128>::bytes(heads, blocks);
}

bool aligned(const void* rows) { return reinterpret_cast<uintptr_t>(rows) % 16 == 0; }

// The launches. Lists are made beside the scan where that leaves half of the device, of which `most` clusters take all.
struct Launches {
  const BankScan& p;
  DType dtype;
  int blocks, clusters, most;  // blocks of a cluster; clusters of the scan
  cudaStream_t stream;

  cudaError_t list() const {
    const int left = most - clusters;
    return list_candidates(p, dtype, left >= most / 2 ? left : 0, blocks, stream);
  }
  cudaError_t scan(ScanKernel kernel, int64_t count, size_t shared) const {
    return launch_clusters(kernel, count, blocks, kScanThreads, shared, stream, p);
  }
  cudaError_t keys() const { return p.banks.summary ? summary_keys(p, dtype, stream) : cudaSuccess; }
};

}  // namespace

Banks banks_served(const BankScanParams& p, DType dtype) {
  const bool scan = (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (p.dim == 64 || p.dim == 128) &&
                    p.kv_heads <= kClusterBlocks && p.chunk <= kMostChunk && aligned(p.v) && aligned(p.state_v);
  if (!scan) return {false, false};
  constexpr int64_t touches = int64_t{1} << 24;  // that the order of a slot's touches can count
  return {p.novelty && p.exact_slots > 0 && p.exact_slots <= kPerLane * kWarp && p.exact_candidates <= kTileRows &&
              p.tokens <= touches && exact_bytes(p.dim) <= kClusterShared,
          p.summary_slots > 0 && p.summary_slots <= kSummaryRows && p.chunk <= kSummaryRows && !p.low_freq_key &&
              aligned(p.kbar) && aligned(p.state_kbar) && summary_bytes(p.dim, p.kv_heads, 1) <= kClusterShared};
}

size_t scan_banks_workspace(const BankScanParams& p, Banks banks) {
  Carver sizes(nullptr);
  CandidateLists(sizes, p, banks);
  return sizes.used();
}

cudaError_t scan_banks(const BankScanForward& params, DType dtype, Banks banks, bool& copied, cudaStream_t stream) {
  Carver carver(params.workspace);
  BankScan p{params, banks, CandidateLists(carver, params, banks), false, wide_rows<__half>(params)};
  const int clusters = static_cast<int>(p.sequences * (banks.exact + banks.summary));
  const auto shared = [&](int blocks) {
    return std::max(banks.exact ? exact_bytes(p.dim) : 0, banks.summary ? summary_bytes(p.dim, p.kv_heads, blocks) : 0);
  };
  // Two blocks a head where the device then still runs all clusters at once.
  const auto exact = exact_scan_in_halves(p.dim, dtype), summary = summary_scan_in_halves(p.dim, dtype);
  const int halves = most_clusters(banks.summary ? summary : exact, 2 * p.kv_heads, kScanThreads, shared(2));
  if (halves >= clusters) {
    p.copies = copied = banks.exact;
    const Launches all{p, dtype, 2 * p.kv_heads, clusters, halves, stream};
    cudaError_t status = all.list();
    if (banks.summary && status == cudaSuccess) status = all.scan(summary, p.sequences, shared(2));
    if (banks.exact && status == cudaSuccess) status = all.scan(exact, p.sequences, shared(2));
    return status == cudaSuccess ? all.keys() : status;
  }
  // Not all at once: in one launch, where one follows the other at once.
  const auto of = [&](auto zero) -> ScanKernel {
    using T = decltype(zero);
    return p.dim == 64 ? scan_banks_kernel<T, 2> : scan_banks_kernel<T, 4>;
  };
  const auto kernel = dtype == DType::kBFloat16 ? of(__nv_bfloat16{}) : of(__half{});
  const Launches all{p, dtype, p.kv_heads, clusters, most_clusters(kernel, p.kv_heads, kScanThreads, shared(1)), stream};
  cudaError_t status = all.list();
  if (status == cudaSuccess) status = all.scan(kernel, clusters, shared(1));
  return status == cudaSuccess ? all.keys() : status;
}

}  // namespace coda::kernels::sm90
