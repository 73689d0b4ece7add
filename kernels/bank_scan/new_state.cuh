#pragma once

#include "../common/launch.cuh"
#include "../common/rotation.cuh"
#include "scan_view.cuh"

namespace coda::kernels {

// Rows are multiples of 16 bytes, and so are the addresses of their tensors.
template <class T>
bool wide_rows(const BankScanForward& p) {
  uintptr_t bits = p.dim * sizeof(T);
  const void* rows[] = {p.k, p.v, p.state_k, p.state_v, p.new_k, p.new_v};
  for (const void* row : rows) bits |= reinterpret_cast<uintptr_t>(row);
  return bits % 16 == 0;
}

constexpr int kSlotsAtOnce = 4;  // of a warp

// How many slots a warp copies: several where there are many, for more bytes under way.
inline int slots_of_warp(const BankScanForward& p) {
  const int64_t heads = p.sequences * p.kv_heads / 32;
  return static_cast<int>(heads < 1 ? 1 : heads < kSlotsAtOnce ? heads : kSlotsAtOnce);
}

// What slots [slot0, slot0 + count) of one KV head hold in the new state: the tokens in flat sources source(i), for a bank slot
// turned back where it was not in a bank before. Who copies the first slot of all counts the tokens. One warp.
template <class T, bool kBank, class Source>
__device__ inline void copy_slots(const BankScanForward& p, const ScanView<T>& view, int head, int slot0, int count,
                                  Source source, bool wide) {
  using A = acc_t<T>;
  const int held = view.held(), group = p.gate_groups == 1 ? 0 : head;
  const int64_t to = view.state_row(slot0, head) * p.dim;
  T *new_k = static_cast<T*>(p.new_k) + to, *new_v = static_cast<T*>(p.new_v) + to;
  const auto turns = [&](int from) { return kBank && p.has_bank_distance && (from < p.window || from >= held); };
  const auto key = [&](int from) { return view.row(p.state_k, p.k, from, head); };
  const auto value = [&](int from) { return view.value(from, head); };
  if (wide) {
    const int packets = p.dim * static_cast<int>(sizeof(T)) / 16;
#pragma unroll 1
    for (int i = lane_id(); i < 2 * packets; i += kWarp) {
      const bool of_key = i < packets;
      const int at = of_key ? i : i - packets;
      uint4 packet[kSlotsAtOnce];
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        if (j >= count) break;
        packet[j] = reinterpret_cast<const uint4*>(of_key ? key(source(j)) : value(source(j)))[at];
      }
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        if (j >= count || (of_key && turns(source(j)))) continue;
        reinterpret_cast<uint4*>((of_key ? new_k : new_v) + j * p.dim)[at] = packet[j];
      }
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const bool turned = turns(source(j));
#pragma unroll 1
      for (int i = lane_id(); i < p.dim; i += kWarp) {
        if (!turned) new_k[j * p.dim + i] = key(source(j))[i];
        new_v[j * p.dim + i] = value(source(j))[i];
      }
    }
  }
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const int from = source(j);
    if (turns(from)) turn_back_row(new_k + j * p.dim, key(from), p.dim, view.position_of(from), p.inv_freq, p.rope_interleaved);
  }
  if (lane_id() < count && head == group) {
    const int slot = slot0 + lane_id();
    static_cast<A*>(p.new_gate)[(view.n * p.gate_groups + group) * held + slot] = view.gate(source(lane_id()), group);
    if (slot == 0 && head == 0) p.new_tokens_seen[view.n] = view.span.end();
  }
}

// The same of slots of the ring: new tokens, or what they held.
template <class T>
__device__ inline void copy_ring_slots(const BankScanForward& p, const ScanView<T>& view, int head, int slot0, int count,
                                       bool wide) {
  const int64_t end = view.span.end(), position = ring_position(end, slot0, p.window);
  copy_slots<T, false>(p, view, head, slot0, count, [&](int i) {
    const int64_t mine = position + i < end ? position + i : position + i - p.window;
    return mine >= view.span.first ? view.held() + static_cast<int>(mine - view.span.first) : slot0 + i;
  }, wide);
}

}  // namespace coda::kernels
