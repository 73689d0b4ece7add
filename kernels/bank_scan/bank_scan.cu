#include "../common/sequences.cuh"
#include "clearing.cuh"
#include "new_state.cuh"
#include "sm90/steps.h"
#include "steps.h"

#include <algorithm>

namespace coda::kernels {
namespace {

constexpr int kWarps = 8;

struct CopyParams : BankScanForward {
  bool wide, behind_attention;
};

constexpr int kClearing = 8;  // blocks of a chunk row

template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) begin_kernel(BankScanForward p) {
  wait_for_stream();
  let_next_start();
  const int64_t row = blockIdx.x;
  const int64_t n = find_sequence(p.sequences, row, [&](int64_t m) { return p.cu_seqlens[m] / p.chunk + 2 * m; });
  clear_row<T>(p, n, row, blockIdx.y, gridDim.y);
}

// One warp copies one slot of one KV head into the new state. Without exact slots nothing else brings the counts. The ring needs
// nothing of the scan, which lets this kernel start once it has itself begun, and so after all that was before it. Behind the
// attention, which has waited for the scan before it lets this kernel start, nothing else does either.
template <class T>
__global__ void __launch_bounds__(kWarps * kWarp, 4) copy_new_state_kernel(CopyParams p) {
  const int slot = static_cast<int>(blockIdx.y) * kWarps + warp_id(), head = static_cast<int>(blockIdx.x % p.kv_heads);
  if (slot >= p.window + p.exact_slots) return;
  const int64_t n = blockIdx.x / p.kv_heads;
  if (p.exact_slots == 0 && slot == 0 && head == 0 && lane_id() == 0) write_counts(p, n, 0, 0);
  if (slot < p.window) copy_ring_slots(p, ScanView<T>(p, n), head, slot, 1, p.wide);
  if (!p.behind_attention) wait_for_stream();
  if (slot >= p.window) {
    const int from = p.source[(n * p.gate_groups + (p.gate_groups == 1 ? 0 : head)) * p.exact_slots + slot - p.window];
    copy_slots<T, true>(p, ScanView<T>(p, n), head, slot, 1, [&](int) { return from < 0 ? slot : from; }, p.wide, p.inv_freq);
  }
  wait_for_stream();
}

// The banks that clusters serve on this device.
sm90::Banks in_clusters(const BankScanParams& params, DType dtype) {
  return device_capability() == 90 ? sm90::banks_served(params, dtype) : sm90::Banks{false, false};
}

cudaError_t begin(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    const dim3 grid(static_cast<unsigned>(params.chunk_rows), kClearing);
    return launch_early(begin_kernel<decltype(zero)>, grid, kWarps * kWarp, 0, stream, params);
  });
}

}  // namespace

cudaError_t bank_scan_new_state(const BankScanForward& params, DType dtype, cudaStream_t stream, bool behind_attention) {
  const int held = params.window + params.exact_slots;
  const dim3 grid(static_cast<unsigned>(params.sequences * params.kv_heads), (held + kWarps - 1) / kWarps);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_early(copy_new_state_kernel<T>, grid, kWarps * kWarp, 0, stream,
                        CopyParams{params, wide_rows<T>(params), behind_attention});
  });
}

size_t bank_scan_workspace(const BankScanParams& params, DType dtype) {
  // The steps run one after the other and share it.
  const auto clusters = in_clusters(params, dtype);
  size_t bytes = clusters ? sm90::scan_banks_workspace(params, clusters) : 0;
  if (!clusters.exact) {
    bytes = std::max(bytes, params.novelty ? novelty_scan_workspace(params, dtype) : retention_scan_workspace(params));
  }
  if (params.summary_slots > 0 && !clusters.summary) bytes = std::max(bytes, summary_scan_workspace(params, dtype));
  return bytes;
}

cudaError_t bank_scan_snapshots(const BankScanForward& params, DType dtype, cudaStream_t stream, bool& copied) {
  const auto clusters = in_clusters(params, dtype);
  copied = false;
  if (clusters) {
    if (const auto status = sm90::scan_banks(params, dtype, clusters, copied, stream); status != cudaSuccess) return status;
  } else if (params.novelty || params.summary_slots > 0) {
    if (const auto status = begin(params, dtype, stream); status != cudaSuccess) return status;
  }
  const bool retention = params.exact_slots > 0 && !params.novelty;
  if (params.exact_slots > 0 && params.novelty && !clusters.exact) {
    if (const auto status = novelty_scan(params, dtype, stream); status != cudaSuccess) return status;
  }
  if (params.summary_slots > 0 && !clusters.summary) {
    if (const auto status = summary_scan(params, dtype, stream); status != cudaSuccess) return status;
  }
  if (!retention) return cudaSuccess;
  copied = true;
  return retention_scan(params, dtype, stream);
}

cudaError_t bank_scan_forward(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  bool copied = false;
  const auto status = bank_scan_snapshots(params, dtype, stream, copied);
  return status != cudaSuccess || copied ? status : bank_scan_new_state(params, dtype, stream, false);
}

}  // namespace coda::kernels
