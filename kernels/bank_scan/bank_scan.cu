#include "../common/launch.cuh"
#include "../common/rotation.cuh"
#include "scan_view.cuh"
#include "sm90/steps.h"
#include "steps.h"

#include <algorithm>

namespace coda::kernels {
namespace {

constexpr int kWarps = 8;

struct CopyParams : BankScanForward {
  bool wide;  // rows are multiples of 16 bytes, and so are the addresses of their tensors
};

// Two rows of one warp, packet by packet where they are wide.
template <class T>
__device__ inline void copy_rows(T* to_a, const T* a, T* to_b, const T* b, int dim, bool wide) {
  if (wide) {
    const int packets = dim * static_cast<int>(sizeof(T)) / 16, from_a = a ? packets : 0;
    for (int i = lane_id(); i < from_a + packets; i += kWarp) {
      const bool first = i < from_a;
      const auto packet = reinterpret_cast<const uint4*>(first ? a : b)[first ? i : i - from_a];
      reinterpret_cast<uint4*>(first ? to_a : to_b)[first ? i : i - from_a] = packet;
    }
  } else {
    for (int d = lane_id(); d < dim; d += kWarp) {
      if (a) to_a[d] = a[d];
      to_b[d] = b[d];
    }
  }
}

// One warp copies one slot of one KV head into the new state.
template <class T>
__global__ void __launch_bounds__(kWarps * kWarp, 4) copy_new_state_kernel(CopyParams p) {
  using A = acc_t<T>;
  const int held = p.window + p.exact_slots, slot = static_cast<int>(blockIdx.y) * kWarps + warp_id();
  if (slot >= held) return;
  const int head = static_cast<int>(blockIdx.x % p.kv_heads), group = p.gate_groups == 1 ? 0 : head;
  const int64_t n = blockIdx.x / p.kv_heads, to = (static_cast<int64_t>(blockIdx.x) * held + slot) * p.dim;
  int64_t source = slot;
  bool to_bank = false;
  if (slot >= p.window) {  // before the view: two loads at once
    const int from = p.source[(n * p.gate_groups + group) * p.exact_slots + slot - p.window];
    if (from >= 0) source = from;
    to_bank = source < p.window || source >= held;
  }
  const ScanView<T> view(p, n);
  if (slot < p.window) {
    const int64_t position = ring_position(view.span.end(), slot, p.window);
    if (position >= view.span.first) source = held + position - view.span.first;
  }
  const bool turns = to_bank && p.has_bank_distance;
  const T* k = view.row(p.state_k, p.k, source, head);
  T* new_k = static_cast<T*>(p.new_k) + to;
  copy_rows(new_k, turns ? nullptr : k, static_cast<T*>(p.new_v) + to, view.value(source, head), p.dim, p.wide);
  if (turns) turn_back_row(new_k, k, p.dim, view.position_of(source), p.inv_freq, p.rope_interleaved);
  if (lane_id() == 0 && head == group) {
    static_cast<A*>(p.new_gate)[(n * p.gate_groups + group) * held + slot] = view.gate(source, group);
  }
}

template <class T>
bool wide_rows(const BankScanForward& p) {
  uintptr_t bits = p.dim * sizeof(T);
  for (const void* rows : {p.k, p.v, p.state_k, p.state_v, static_cast<const void*>(p.new_k), static_cast<const void*>(p.new_v)}) {
    bits |= reinterpret_cast<uintptr_t>(rows);
  }
  return bits % 16 == 0;
}

// The banks that clusters serve on this device.
sm90::Banks in_clusters(const BankScanParams& params, DType dtype) {
  return device_capability() == 90 ? sm90::banks_served(params, dtype) : sm90::Banks{false, false};
}

cudaError_t copy_new_state(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  const int held = params.window + params.exact_slots;
  const dim3 grid(static_cast<unsigned>(params.sequences * params.kv_heads), (held + kWarps - 1) / kWarps);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(copy_new_state_kernel<T>, grid, kWarps * kWarp, 0, stream, CopyParams{params, wide_rows<T>(params)});
  });
}

}  // namespace

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
