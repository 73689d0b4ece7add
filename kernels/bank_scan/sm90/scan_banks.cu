#include "exact_scan.cuh"
#include "summary_scan.cuh"

#include <algorithm>

namespace coda::kernels::sm90 {
namespace {

constexpr int kBarriers = 6;

// The clusters of the summary bank, which take longer, come first; then those of the exact bank, one of each for each sequence.
template <class T, int kParts, int kBlocks>
__global__ void __launch_bounds__(kScanThreads) scan_banks_kernel(BankScan p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barriers[kBarriers];
  wait_for_stream();
  const int64_t cluster = blockIdx.x / (p.kv_heads * kBlocks), summaries = p.banks.summary ? p.sequences : 0;
  if (cluster < summaries) {
    SummaryScan<T, kParts, kBlocks>(p, cluster, shared, barriers).run();
  } else {
    ExactScan<T, kParts, kBlocks>(p, cluster - summaries, shared, barriers).run();
  }
}

template <class T>
size_t exact_bytes(const BankScanParams& p) {
  return p.dim == 64 ? sizeof(ExactShared<T, 64>) : sizeof(ExactShared<T, 128>);
}
template <class T>
size_t summary_bytes(const BankScanParams& p, int blocks) {
  return p.dim == 64 ? SummaryShared<T, 64>::bytes(p.kv_heads, blocks) : SummaryShared<T, 128>::bytes(p.kv_heads, blocks);
}

bool aligned(const void* rows) { return reinterpret_cast<uintptr_t>(rows) % 16 == 0; }

}  // namespace

Banks banks_served(const BankScanParams& p, DType dtype) {
  using T = __nv_bfloat16;  // layouts are those of float16
  const bool scan = (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (p.dim == 64 || p.dim == 128) &&
                    p.kv_heads <= kClusterBlocks && p.chunk <= kScanThreads && aligned(p.v) && aligned(p.state_v);
  if (!scan) return {false, false};
  constexpr int64_t touches = int64_t{1} << 24;  // that the order of a slot's touches can count
  return {p.novelty && p.exact_slots > 0 && p.exact_slots <= kPerLane * kWarp && p.exact_candidates <= kTileRows &&
              p.tokens <= touches && exact_bytes<T>(p) <= kClusterShared,
          p.summary_slots > 0 && p.summary_slots <= kSummaryRows && p.chunk <= kSummaryRows && !p.low_freq_key &&
              aligned(p.kbar) && aligned(p.state_kbar) && summary_bytes<T>(p, 1) <= kClusterShared};
}

size_t scan_banks_workspace(const BankScanParams& p, Banks banks) {
  Carver sizes(nullptr);
  CandidateLists(sizes, p, banks);
  return sizes.used();
}

cudaError_t scan_banks(const BankScanForward& params, DType dtype, Banks banks, cudaStream_t stream) {
  Carver carver(params.workspace);
  const BankScan p{params, banks, CandidateLists(carver, params, banks)};
  if (const auto status = list_candidates(p, dtype, stream); status != cudaSuccess) return status;
  const int64_t clusters = p.sequences * (banks.exact + banks.summary);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto shared = [&](int blocks) {
      return std::max(banks.exact ? exact_bytes<T>(p) : 0, banks.summary ? summary_bytes<T>(p, blocks) : 0);
    };
    // Two blocks a head where all clusters run at once all the same.
    const auto halves = p.dim == 64 ? scan_banks_kernel<T, 2, 2> : scan_banks_kernel<T, 4, 2>;
    if (clusters_fit(halves, clusters, 2 * p.kv_heads, kScanThreads, shared(2))) {
      return launch_clusters(halves, clusters, 2 * p.kv_heads, kScanThreads, shared(2), stream, p);
    }
    const auto whole = p.dim == 64 ? scan_banks_kernel<T, 2, 1> : scan_banks_kernel<T, 4, 1>;
    return launch_clusters(whole, clusters, p.kv_heads, kScanThreads, shared(1), stream, p);
  };
  return dtype == DType::kBFloat16 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace coda::kernels::sm90
