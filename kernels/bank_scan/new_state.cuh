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

__device__ inline void fetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// What slots [slot0, slot0 + count) of one KV head hold in the new state: the tokens in flat sources source(i), for a bank slot
// turned back where it was not in a bank before, by frequencies that may have been brought near. Who copies the first slot of all
// counts the tokens. One warp.
template <class T, bool kBank, class Source>
__device__ inline void copy_slots(const BankScanForward& p, const ScanView<T>& view, int head, int slot0, int count,
                                  Source source, bool wide, const double* inv_freq) {
  using A = acc_t<T>;
  const int held = view.held(), group = p.gate_groups == 1 ? 0 : head, lane = lane_id();
  const int64_t to = view.state_row(slot0, head) * p.dim;
  T *new_k = static_cast<T*>(p.new_k) + to, *new_v = static_cast<T*>(p.new_v) + to;
  const auto turns = [&](int from) { return kBank && p.has_bank_distance && (from < p.window || from >= held); };
  const auto key = [&](int from) { return view.row(p.state_k, p.k, from, head); };
  const auto value = [&](int from) { return view.value(from, head); };
  const bool gates = lane < count && head == group;
  const A gate = gates ? view.gate(source(lane), group) : A(0);
  const auto copy_gates = [&] {
    if (!gates) return;
    const int slot = slot0 + lane;
    static_cast<A*>(p.new_gate)[(view.n * p.gate_groups + group) * held + slot] = gate;
    if (slot == 0 && head == 0) p.new_tokens_seen[view.n] = view.span.end();
  };
  constexpr int kElements = 16 / sizeof(T);  // of a packet
  const int packets = p.dim / kElements;
  if (!wide || (kBank && p.dim % 4 > 0)) {
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const int from = source(j);
      if (turns(from)) {
        turn_back_row(new_k + j * p.dim, key(from), p.dim, view.position_of(from), inv_freq, p.rope_interleaved);
      }
#pragma unroll 1
      for (int i = lane; i < p.dim; i += kWarp) {
        if (!turns(from)) new_k[j * p.dim + i] = key(from)[i];
        new_v[j * p.dim + i] = value(from)[i];
      }
    }
    copy_gates();
  } else if (!kBank) {
#pragma unroll 1
    for (int i = lane; i < 2 * packets; i += kWarp) {
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
        if (j >= count) break;
        reinterpret_cast<uint4*>((of_key ? new_k : new_v) + j * p.dim)[at] = packet[j];
      }
    }
    copy_gates();
  } else {
    // Keys turn last, and come from the cache then. A lane turns two planes of two slots at once, as one such angle waits for
    // itself most of the time; their elements lie two and two, or all four together.
    struct alignas(2 * sizeof(T)) Two {
      T x, y;
    };
    constexpr int kLine = 128 / sizeof(T), kTurned = sizeof(A) == sizeof(float) ? 2 : 1;
    const int from = source(min(lane, count - 1));
    const T *my_key = key(from), *my_value = value(from);  // lane j has slot j's
    const auto of = [](const T* mine, int j) {
      return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(mine), j));
    };
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const T* const row = of(my_key, j);
      for (int i = lane * kLine; i < p.dim; i += kWarp * kLine) fetch_line(row + i);
    }
#pragma unroll 1
    for (int i = lane; i - lane < packets; i += kWarp) {
      uint4 packet[kSlotsAtOnce];
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        const T* const row = of(my_value, j);
        if (j < count && i < packets) packet[j] = reinterpret_cast<const uint4*>(row)[i];
      }
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        if (j < count && i < packets) reinterpret_cast<uint4*>(new_v + j * p.dim)[i] = packet[j];
      }
    }
    copy_gates();
    my_key = key(from);  // again: to hold it takes registers
    const int64_t back = turns(from) ? -view.position_of(from) : 0;
    const unsigned turned = __ballot_sync(kAllLanes, turns(from));
    const bool together = p.rope_interleaved;
#pragma unroll 1
    for (int i = 2 * lane; i - 2 * lane < p.dim / 2; i += 2 * kWarp) {
      const bool inside = i < p.dim / 2;
      const int low = together ? 2 * i : i, high = together ? low + 2 : i + p.dim / 2;
#pragma unroll 1
      for (int base = 0; base < count; base += kTurned) {
        Two a[kTurned], b[kTurned];
#pragma unroll
        for (int j = 0; j < kTurned; ++j) {
          const T* const row = of(my_key, base + j);
          if (base + j >= count || !inside) continue;
          a[j] = *reinterpret_cast<const Two*>(row + low);
          b[j] = *reinterpret_cast<const Two*>(row + high);
        }
#pragma unroll
        for (int j = 0; j < kTurned; ++j) {
          const int64_t position = __shfl_sync(kAllLanes, back, base + j);
          if (base + j >= count || !inside) continue;
          if (turned >> (base + j) & 1) {
            const auto first = angle_beside<A>(position, inv_freq[i]), second = angle_beside<A>(position, inv_freq[i + 1]);
            A k0 = widen(a[j].x), k1 = widen(together ? a[j].y : b[j].x);
            A l0 = widen(together ? b[j].x : a[j].y), l1 = widen(b[j].y);
            turn_pair(k0, k1, first);
            turn_pair(l0, l1, second);
            a[j] = {narrow<T>(k0), narrow<T>(together ? k1 : l0)};
            b[j] = {narrow<T>(together ? l0 : k1), narrow<T>(l1)};
          }
          *reinterpret_cast<Two*>(new_k + (base + j) * p.dim + low) = a[j];
          *reinterpret_cast<Two*>(new_k + (base + j) * p.dim + high) = b[j];
        }
      }
    }
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
  }, wide, nullptr);
}

// The ring cut into parts for blocks of some warps, each of which copies `count` slots of a KV head.
inline int64_t ring_parts(const BankScanForward& p, int warps, int count) {
  return p.sequences * p.kv_heads * ((p.window + warps * count - 1) / (warps * count));
}
template <class T>
__device__ inline void copy_ring_part(const BankScanForward& p, int part, int count, bool wide) {
  const int slots = warp_count() * count, parts = (p.window + slots - 1) / slots, row = part / parts;
  const int slot = part % parts * slots + warp_id() * count;
  if (slot >= p.window) return;
  copy_ring_slots(p, ScanView<T>(p, row / p.kv_heads), row % p.kv_heads, slot, min(count, p.window - slot), wide);
}

}  // namespace coda::kernels
