#include "../common/launch.cuh"
#include "../common/rotation.cuh"
#include "scan_view.cuh"
#include "sm90/steps.h"
#include "steps.h"

#include <algorithm>

namespace coda::kernels {
namespace {

constexpr int kWarps = 8;

// One warp copies one slot of one KV head into the new state.
template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) copy_new_state_kernel(BankScanForward p) {
  using A = acc_t<T>;
  const int held = p.window + p.exact_slots;
  const int64_t item = blockIdx.x * static_cast<int64_t>(kWarps) + warp_id();
  if (item >= p.sequences * p.kv_heads * held) return;
  const int slot = static_cast<int>(item % held), head = static_cast<int>(item / held % p.kv_heads);
  const ScanView<T> view(p, item / held / p.kv_heads);
  const int group = p.gate_groups == 1 ? 0 : head;
  int64_t source = slot;
  bool to_bank = false;
  if (slot < p.window) {
    const int64_t position = ring_position(view.span.end(), slot, p.window);
    if (position >= view.span.first) source = held + position - view.span.first;
  } else {
    const int from = p.source[(view.n * p.gate_groups + group) * p.exact_slots + slot - p.window];
    if (from >= 0) source = from;
    to_bank = source < p.window || source >= held;
  }
  const T *k = view.row(p.state_k, p.k, source, head), *v = view.value(source, head);
  T *new_k = static_cast<T*>(p.new_k) + item * p.dim, *new_v = static_cast<T*>(p.new_v) + item * p.dim;
  if (to_bank && p.has_bank_distance) {
    turn_back_row(new_k, k, p.dim, view.position_of(source), p.inv_freq, p.rope_interleaved);
  } else {
    for (int d = lane_id(); d < p.dim; d += kWarp) new_k[d] = k[d];
  }
  for (int d = lane_id(); d < p.dim; d += kWarp) new_v[d] = v[d];
  if (lane_id() == 0 && head == group) {
    static_cast<A*>(p.new_gate)[(view.n * p.gate_groups + group) * held + slot] = view.gate(source, group);
  }
}

// The banks that clusters serve on this device.
sm90::Banks in_clusters(const BankScanParams& params, DType dtype) {
  return device_capability() == 90 ? sm90::banks_served(params, dtype) : sm90::Banks{false, false};
}

}  // namespace

cudaError_t copy_new_state(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  const int64_t slots = params.sequences * params.kv_heads * (params.window + params.exact_slots);
  const dim3 grid(static_cast<unsigned>((slots + kWarps - 1) / kWarps));
  return dispatch(dtype, [&](auto zero) {
    return launch(copy_new_state_kernel<decltype(zero)>, grid, kWarps * kWarp, 0, stream, params);
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

cudaError_t bank_scan_forward(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  const auto clusters = in_clusters(params, dtype);
  if (clusters) {
    if (const auto status = sm90::scan_banks(params, dtype, clusters, stream); status != cudaSuccess) return status;
  }
  if (params.exact_slots > 0 && !clusters.exact) {
    const auto status = params.novelty ? novelty_scan(params, dtype, stream) : retention_scan(params, dtype, stream);
    if (status != cudaSuccess) return status;
  }
  if (params.summary_slots > 0 && !clusters.summary) {
    if (const auto status = summary_scan(params, dtype, stream); status != cudaSuccess) return status;
  }
  return copy_new_state(params, dtype, stream);
}

}  // namespace coda::kernels
