#pragma once

#include "../../common/mma.cuh"
#include "items.cuh"

namespace coda::kernels::sm90::bounded {

constexpr int kBringers = 2;  // warps for keys, and as many for values; they share the rows of a tile, 32 at a time

// One warp that brings rows of keys, or of values.
template <class T, int D, int Streams>
struct BringKeys {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kPackets = D / kPacket;         // of a row
  static constexpr int kRowsAtOnce = kWarp / kPackets;  // rows of one copy of the warp
  const Arguments& p;
  Memory& shared;
  const bool values;
  Place& item;
  hopper::RingPosition<Memory::kStages> at;

  __device__ BringKeys(const Arguments& arguments, Memory& memory, int warp)
      : p(arguments), shared(memory), values(warp >= kBringers), item(memory.place[warp]) {}

  struct Row {
    const T* from = nullptr;  // zeros where null
    float bias = neg_inf<float>();
  };

  // Of the warps that bring the same tiles.
  __device__ static bool first() { return warp_id() % kBringers == 0; }

  // Rows of (N, Hkv, W + Me) and (T, Hkv).
  __device__ const T* state_row(const void* rows, int slot) const {
    const int held = p.window + p.exact_slots;
    return static_cast<const T*>(rows) + static_cast<int64_t>((item.sequence * p.kv_heads + item.kv_head) * held + slot) * D;
  }
  __device__ const T* token_row(const void* rows, int token) const {
    return static_cast<const T*>(rows) + static_cast<int64_t>((item.token0 + token) * p.kv_heads + item.kv_head) * D;
  }

  __device__ Row bank_row(int slot) const {
    Row row;
    const int gate_group = p.gate_groups == 1 ? 0 : item.kv_head;
    if (slot < p.exact_slots) {
      const int held = p.window + p.exact_slots;
      const int source = __ldg(p.index + static_cast<int64_t>(item.snapshot * p.gate_groups + gate_group) * p.exact_slots + slot);
      if (source < 0) return row;
      const int token = source - held;
      row.from = token < 0 ? state_row(values ? p.state_v : p.state_kbar, source)
                           : token_row(values ? p.v : p.kbar, token);
      row.bias = 0.0f;
      if (!values && p.gate_bias && slot >= p.num_sinks) {
        row.bias = log_sigmoid(
            token < 0 ? static_cast<const float*>(p.state_gate)[(item.sequence * p.gate_groups + gate_group) * held + source]
                      : static_cast<const float*>(p.gate)[static_cast<int64_t>(item.token0 + token) * p.gate_groups + gate_group]);
      }
      return row;
    }
    slot -= p.exact_slots;
    if (slot >= p.summary_slots) return row;
    const float mass = static_cast<const float*>(p.summary_mass)[item.snapshot * p.summary_slots + slot];
    if (!(mass > 0.0f)) return row;
    row.bias = p.mass_bias ? logf(mass) : 0.0f;
    const int64_t at = (item.snapshot * p.kv_heads + item.kv_head) * p.summary_slots + slot;
    row.from = static_cast<const T*>(p.summary_rounded) + (at + (values ? p.summary_rows : 0)) * D;
    return row;
  }
  __device__ Row window_row(int key) const {
    Row row;
    if (key >= item.keys) return row;
    const int token = item.window_begin + key, slot = item.ring_begin + key;
    row.from = token < 0 ? state_row(values ? p.state_v : p.state_k, slot < p.window ? slot : slot - p.window)
                         : token_row(values ? p.v : p.k, token);
    return row;
  }

  __device__ static unsigned char* packet_of(unsigned char* tile, int row, int packet) {
    return tile + packet / 8 * kKeys * 128 + hopper::swizzled(row, packet % 8);
  }

  // 32 rows from `row0` of the tile on, of which each lane has one.
  __device__ void copy_rows(unsigned char* tile, int row0, const T* mine) const {
    const int packet = lane_id() % kPackets;
    constexpr int kCopies = 8 / kRowsAtOnce;  // of the eight rows after which the swizzle repeats
#pragma unroll 1
    for (int eight = 0; eight < kWarp; eight += 8) {
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        const int i = j * kRowsAtOnce + lane_id() / kPackets;
        const auto* row = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(mine), eight + i));
        ampere::copy_packet(packet_of(tile, i, packet) + (row0 + eight) * 128, row + packet * kPacket, row != nullptr);
      }
    }
  }

  __device__ void bring(int tile) {
    const int stage = at.stage;
    T* to = values ? shared.v[stage] : shared.k[stage];
    auto* full = values ? &shared.v_full[stage] : &shared.k_full[stage];
    auto* empty = values ? &shared.v_empty[stage] : &shared.k_empty[stage];
    const uint32_t parity = at.parity ^ 1;
    at.advance();
    const bool bank = tile < item.bank_tiles;
    const int key0 = (bank ? tile : tile - item.bank_tiles) * kKeys;
    if (!bank) {
      // The copy engine brings what lies wholly in the chunk and the tokens before it.
      const int token = item.window_begin + key0;
      if (token >= 0 && token + kKeys <= item.chunk_end) {
        hopper::wait(empty, parity);
        if (lane_id() == 0) {
          if (first()) {
            hopper::arrive_expect(full, kKeys * D * sizeof(T));
            for (int panel = 0; panel < D / 64; ++panel) {
              hopper::load_box(to + panel * kKeys * 64, values ? &p.v_map : &p.k_map, full, panel * 64, item.kv_head,
                               static_cast<int>(item.token0 + token), 0);
            }
          } else {
            hopper::arrive(full);
          }
        }
        __syncwarp();
        return;
      }
    }
    hopper::wait(empty, parity);
#pragma unroll 1
    for (int row0 = first() ? 0 : kWarp; row0 < kKeys; row0 += kBringers * kWarp) {
      const int key = key0 + row0 + lane_id();
      const Row row = bank ? bank_row(key) : window_row(key);
      if (bank && !values) shared.bias[stage][row0 + lane_id()] = row.bias * p.inverse_scale;
      copy_rows(reinterpret_cast<unsigned char*>(to), row0, row.from);
    }
    ampere::commit_copies();
    ampere::wait_copies<0>();
    hopper::fence_async_proxy();
    __syncwarp();
    if (lane_id() == 0) hopper::arrive(full);
  }

  __device__ void run() {
    if (first() && lane_id() == 0) hopper::prefetch_map(values ? &p.v_map : &p.k_map);
    for_items(p, item, item_rows(Streams), [&] {
#pragma unroll 1
      for (int tile = 0; tile < item.tiles; ++tile) bring(tile);
    });
  }
};

}  // namespace coda::kernels::sm90::bounded
