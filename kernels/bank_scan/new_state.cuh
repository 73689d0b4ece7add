#pragma once

#include "../common/launch.cuh"
#include "../common/rotation.cuh"
#include "scan_view.cuh"

namespace coda::kernels {

// Rows are multiples of 16 bytes, and so are the addresses of their tensors.
template <class T>
bool wide_rows(const BankScanForward& p) {
  uintptr_t bits = p.dim * sizeof(T);
  for (const void* rows : {p.k, p.v, p.state_k, p.state_v, static_cast<const void*>(p.new_k), static_cast<const void*>(p.new_v)}) {
    bits |= reinterpret_cast<uintptr_t>(rows);
  }
  return bits % 16 == 0;
}

// Two rows of one warp, packet by packet where they are wide.
template <class T>
__device__ inline void copy_rows(T* to_a, const T* a, T* to_b, const T* b, int dim, bool wide) {
  if (wide) {
    const int packets = dim * static_cast<int>(sizeof(T)) / 16, from_a = a ? packets : 0;
#pragma unroll 1
    for (int i = lane_id(); i < from_a + packets; i += kWarp) {
      const bool first = i < from_a;
      const auto packet = reinterpret_cast<const uint4*>(first ? a : b)[first ? i : i - from_a];
      reinterpret_cast<uint4*>(first ? to_a : to_b)[first ? i : i - from_a] = packet;
    }
  } else {
#pragma unroll 1
    for (int d = lane_id(); d < dim; d += kWarp) {
      if (a) to_a[d] = a[d];
      to_b[d] = b[d];
    }
  }
}

// What slot `slot` of one KV head holds in the new state: the token in flat source `source`, for a bank slot turned back where it was
// not in a bank before. That of the first slot of all counts the tokens. One warp.
template <class T>
__device__ inline void copy_slot(const BankScanForward& p, const ScanView<T>& view, int head, int slot, int64_t source, bool wide) {
  using A = acc_t<T>;
  const int held = view.held(), group = p.gate_groups == 1 ? 0 : head;
  const int64_t to = view.state_row(slot, head) * p.dim;
  const bool turns = p.has_bank_distance && slot >= p.window && (source < p.window || source >= held);
  const T* k = view.row(p.state_k, p.k, source, head);
  T* new_k = static_cast<T*>(p.new_k) + to;
  copy_rows(new_k, turns ? nullptr : k, static_cast<T*>(p.new_v) + to, view.value(source, head), p.dim, wide);
  if (turns) turn_back_row(new_k, k, p.dim, view.position_of(source), p.inv_freq, p.rope_interleaved);
  if (lane_id() == 0 && head == group) {
    static_cast<A*>(p.new_gate)[(view.n * p.gate_groups + group) * held + slot] = view.gate(source, group);
    if (slot == 0 && head == 0) p.new_tokens_seen[view.n] = view.span.end();
  }
}

// What a slot of the ring holds then: a new token, or what it held.
template <class T>
__device__ inline int64_t ring_source(const ScanView<T>& view, int slot) {
  const int64_t position = ring_position(view.span.end(), slot, view.p.window);
  return position >= view.span.first ? view.held() + position - view.span.first : slot;
}

}  // namespace coda::kernels
