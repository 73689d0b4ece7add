#pragma once

#include "../../common/mma.cuh"
#include "items.cuh"

namespace coda::kernels::sm90::bounded {

// The angle of a phase in radians, in float64 reduced to [-pi, pi], where the approximate sine and cosine are good to
// 2^-20: far below what rounding a query costs.
__device__ inline Angle<float> angle_of_phase(double phase) {
  const double turns = phase * 0.15915494309189535;
  const float x = static_cast<float>((turns - rint(turns)) * 6.283185307179586);
  return {__cosf(x), __sinf(x)};
}

// Absolute errors of 2^-21, which in a logit are far below what rounding its operands costs.
__device__ inline float log_sigmoid_approximate(float z) { return fminf(z, 0.0f) - __logf(1.0f + __expf(-fabsf(z))); }

// One warp that brings: a quarter of the queries of each item, and of the rows of each tile of keys and values.
template <class T, int D, int Streams>
struct Bring {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kPackets = D / kPacket;          // of a row
  static constexpr int kRowsAtOnce = kWarp / kPackets;  // rows of one copy of the warp
  static_assert(kBringers * kWarp == kKeys, "a lane knows one row of a tile");
  const Arguments& p;
  Memory& shared;
  const int warp;
  Place& place;
  Ring<Memory::kStages> ring;
  double frequency = 0.0;  // of the pair whose angle this lane works out

  __device__ Bring(const Arguments& arguments, Memory& memory, int n)
      : p(arguments), shared(memory), warp(n), place(memory.place[n]) {}

  // Where a key and its value are; zeros where null.
  struct Row {
    const T* key = nullptr;
    const T* value = nullptr;
    float bias = neg_inf<float>();
  };
  __device__ Row row_at(const void* keys, const void* values, int64_t row) const {
    return {static_cast<const T*>(keys) + row * D, static_cast<const T*>(values) + row * D, 0.0f};
  }
  // Rows of (N, Hkv, W + Me) and (T, Hkv).
  __device__ int64_t state_row(const Item& item, int slot) const {
    return static_cast<int64_t>(item.sequence * p.kv_heads + item.kv_head) * (p.window + p.exact_slots) + slot;
  }
  __device__ int64_t token_row(const Item& item, int token) const {
    return static_cast<int64_t>(item.token0 + token) * p.kv_heads + item.kv_head;
  }

  __device__ Row bank_row(const Item& item, int slot) const {
    if (slot < p.exact_slots) {
      const int gate_group = p.gate_groups == 1 ? 0 : item.kv_head, held = p.window + p.exact_slots;
      const int source =
          __ldg(p.index + static_cast<int64_t>(item.snapshot * p.gate_groups + gate_group) * p.exact_slots + slot);
      if (source < 0) return {};
      const int token = source - held;
      Row row = token < 0 ? row_at(p.state_kbar, p.state_v, state_row(item, source))
                          : row_at(p.kbar, p.v, token_row(item, token));
      if (p.gate_bias && slot >= p.num_sinks) {
        row.bias = log_sigmoid_approximate(
            token < 0
                ? static_cast<const float*>(p.state_gate)[(item.sequence * p.gate_groups + gate_group) * held + source]
                : static_cast<const float*>(
                      p.gate)[static_cast<int64_t>(item.token0 + token) * p.gate_groups + gate_group]);
      }
      return row;
    }
    slot -= p.exact_slots;
    if (slot >= p.summary_slots) return {};
    const float mass = static_cast<const float*>(p.summary_mass)[item.snapshot * p.summary_slots + slot];
    if (!(mass > 0.0f)) return {};
    const T* keys = static_cast<const T*>(p.summary_rounded);
    Row row = row_at(keys, keys + p.summary_rows * D,
                     static_cast<int64_t>(item.snapshot * p.kv_heads + item.kv_head) * p.summary_slots + slot);
    if (p.mass_bias) row.bias = __logf(mass);
    return row;
  }
  __device__ Row window_row(const Item& item, int key) const {
    if (key >= item.keys) return {};
    const int token = item.window_begin + key, slot = item.ring_begin + key;
    return token < 0 ? row_at(p.state_k, p.state_v, state_row(item, slot < p.window ? slot : slot - p.window))
                     : row_at(p.k, p.v, token_row(item, token));
  }

  template <int Rows>
  __device__ static unsigned char* packet_of(T* tile, int row, int packet) {
    return reinterpret_cast<unsigned char*>(tile) + packet / 8 * Rows * 128 + hopper::swizzled(row, packet % 8);
  }

  // A lane works out the angle of one pair.
  __device__ bool works_out_angle() const { return (p.turns_keys || p.turns_queries) && lane_id() < D / 2 / kBringers; }
  __device__ int angle_pair() const { return warp * (D / 2 / kBringers) + lane_id(); }

  // This warp's share of the queries of item number n, zeros past the end of the chunk; of the angles of the turn towards
  // the bank; and what the item is, or that there is none.
  __device__ void bring_queries(int n, bool found) {
    const Item& item = place.item[n % 2];
    const int set = n % kQuerySets;
    hopper::wait(&shared.q_empty[set], n / kQuerySets % 2 ^ 1);
    if (found) {
      constexpr int kShare = Memory::kRows / kBringers;
      if (p.boxed_queries && item.row0 + Memory::kRows <= item.rows) {
        if (warp == 0 && lane_id() == 0) {
          hopper::expect(&shared.q_full[set], Memory::kRows * D * sizeof(T));
          for (int panel = 0; panel < D / 64; ++panel) {
            hopper::load_box(shared.q[set] + panel * Memory::kRows * 64, &p.q_map, &shared.q_full[set], panel * 64,
                             item.kv_head * p.group, item.first_token + p.split(item.row0).token, 0);
          }
        }
        __syncwarp();
      } else {
        const int packet = lane_id() % kPackets;
#pragma unroll 1
        for (int i = warp * kShare + lane_id() / kPackets; i < (warp + 1) * kShare; i += kRowsAtOnce) {
          ampere::copy_packet(packet_of<Memory::kRows>(shared.q[set], i, packet),
                              static_cast<const T*>(p.q) + line_of(item, i) * D + packet * kPacket,
                              item.row0 + i < item.rows);
        }
      }
      if (n == 0 && p.norm_weight && lane_id() < D / kBringers) {
        const int i = warp * (D / kBringers) + lane_id();
        ampere::copy_word(&shared.norm_weight[i], static_cast<const float*>(p.norm_weight) + i, true);
      }
      if (works_out_angle() && !(item.flags & Item::kFollows)) {
        shared.bank_angles[item.chunk_slot][angle_pair()] =
            angle_of_phase(mul_rn(static_cast<double>(p.bank_distance - item.position), frequency));
      }
    }
    if (warp == 0 && lane_id() < kItemWords)
      words_of(shared.item[n % kItems])[lane_id()] = found ? words_of(item)[lane_id()] : 0;
    announce(&shared.q_full[set]);
  }

  // Of row i of an item. Past the end of the chunk it is never read.
  __device__ int64_t line_of(const Item& item, int i) const {
    const auto at = p.split(item.row0 + i);
    return item.line0 + static_cast<uint32_t>(at.token * p.heads + at.head);
  }

  // What the warp has written is complete, once its copies are: nothing here waits for them.
  static constexpr int kArrivals = kBringers * (kWarp + 1);
  __device__ static void announce(uint64_t* full) {
    ampere::arrive_after_copies(full);
    __syncwarp();
    if (lane_id() == 0) hopper::arrive(full);
  }

  // Of 32 rows of the tile each lane has one.
  __device__ void copy_rows(T* tile, const T* mine) const {
    const int packet = lane_id() % kPackets;
    constexpr int kCopies = 8 / kRowsAtOnce;  // of the eight rows after which the swizzle repeats
#pragma unroll 1
    for (int eight = 0; eight < kWarp; eight += 8) {
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        const int i = j * kRowsAtOnce + lane_id() / kPackets;
        const auto* row =
            reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(mine), eight + i));
        ampere::copy_packet(packet_of<kKeys>(tile, i, packet) + (warp * kWarp + eight) * 128, row + packet * kPacket,
                            row != nullptr);
      }
    }
  }

  // This warp's rows of a tile of item number n's bank, in place: q . R(-a) k = (R(a) q) . k. A lane has two packets of
  // a row that are half a row apart, and so both elements of every plane of either pairing.
  __device__ void turn_keys(T* tile, int n, int chunk_slot) const {
    constexpr int kParts = D / 16;
    const int part = lane_id() % kParts;
    hopper::wait(&shared.q_full[n % kQuerySets], n / kQuerySets % 2);  // and with it the angles of all warps
    const Angle<float>* angles = shared.bank_angles[chunk_slot] + (p.rope_interleaved ? 4 : 8) * part;
#pragma unroll 1
    for (int row = warp * kWarp + lane_id() / kParts; row < (warp + 1) * kWarp; row += kWarp / kParts) {
      uint4* const at[2] = {reinterpret_cast<uint4*>(packet_of<kKeys>(tile, row, part)),
                            reinterpret_cast<uint4*>(packet_of<kKeys>(tile, row, part + kParts))};
      float x[2][kPacket];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_packet(x[i], reinterpret_cast<const T*>(at[i]));
      const auto turn_back = [](float& a, float& b, Angle<float> by) {
        const float turned = fmaf(a, by.cos, b * by.sin);
        b = fmaf(b, by.cos, -(a * by.sin));
        a = turned;
      };
      if (p.rope_interleaved) {
#pragma unroll
        for (int i = 0; i < kPacket; ++i)
          turn_back(x[i / 4][i % 4 * 2], x[i / 4][i % 4 * 2 + 1], angles[i / 4 * (D / 4) + i % 4]);
      } else {
#pragma unroll
        for (int i = 0; i < kPacket; ++i) turn_back(x[0][i], x[1][i], angles[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) store_packet(reinterpret_cast<T*>(at[i]), x[i]);
    }
  }

  // By the copy engine, from token `token` on over all sequences.
  __device__ void load_tile(T* tile, const CUtensorMap& map, uint64_t* full, const Item& item, uint32_t token) {
    if (lane_id() == 0) {
      if (warp == 0) {
        hopper::expect(full, kKeys * D * sizeof(T));
        for (int panel = 0; panel < D / 64; ++panel) {
          hopper::load_box(tile + panel * kKeys * 64, &map, full, panel * 64, item.kv_head, static_cast<int>(token), 0);
        }
      }
      hopper::arrive(full, kWarp + 1);
    }
    __syncwarp();
  }

  __device__ void bring_tile(int n, const Item& item, int tile) {
    const int stage = ring.stage;
    const uint32_t parity = ring.parity() ^ 1;
    const bool bank = tile >= item.window_tiles;
    const int key0 = (bank ? tile - item.window_tiles : tile) * kKeys, token = item.window_begin + key0;
    // The copy engine brings what lies wholly in the chunk and the tokens before it.
    if (!bank && token >= 0 && token + kKeys <= item.chunk_end) {
      hopper::wait(&shared.k_empty[stage], parity);
      load_tile(shared.k[stage], p.k_map, &shared.k_full[stage], item, item.token0 + token);
      hopper::wait(&shared.v_empty[stage], parity);
      load_tile(shared.v[stage], p.v_map, &shared.v_full[stage], item, item.token0 + token);
      return;
    }
    if (bank) wait_for_stream();  // whose keys and summaries are the only things here that the kernels before make
    const int mine = warp * kWarp + lane_id();
    const Row row = bank ? bank_row(item, key0 + mine) : window_row(item, key0 + mine);
    hopper::wait(&shared.k_empty[stage], parity);
    if (bank) shared.bias[stage][mine] = row.bias * p.inverse_scale;
    copy_rows(shared.k[stage], row.key);
    if (may_turn_keys(D, Streams) && bank && p.turns_keys) {
      ampere::commit_copies();
      ampere::wait_copies<0>();
      __syncwarp();
      turn_keys(shared.k[stage], n, item.chunk_slot);
    }
    announce(&shared.k_full[stage]);
    hopper::wait(&shared.v_empty[stage], parity);
    copy_rows(shared.v[stage], row.value);
    announce(&shared.v_full[stage]);
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      if (p.boxed_queries) hopper::prefetch_map(&p.q_map);
      hopper::prefetch_map(&p.k_map);
      hopper::prefetch_map(&p.v_map);
    }
    if (works_out_angle()) frequency = p.inv_freq[angle_pair()];
    place.left = place.claims = 0;
    place.next = place.row0_of_sequence = place.chunks_begun = 0;
    __syncwarp();
    bool found = false;
    // Item number n; beside its first keys, or before them all, the queries of the next.
#pragma unroll 1
    for (int n = -1; n < 0 || found; ++n) {
      const Item& item = place.item[n & 1];
      const bool follows = n >= 0 && item.flags & Item::kFollows;
      const int steps = n < 0 ? 1 : item.tiles;
      ring.begin(follows);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        if (n >= 0) {
          const bool fresh = ring.fresh(follows, step);
          ring.advance(fresh);
          if (fresh) bring_tile(n, item, item.flags & Item::kBackwards ? item.tiles - 1 - step : step);
        }
        if (step == 0) {
          found = find_item(p, place, shared.claim, Memory::kRows, place.item[~n & 1], item,
                            n >= 0 && item.flags & Item::kFollowed);
          bring_queries(n + 1, found);
        }
      }
    }
  }
};

}  // namespace coda::kernels::sm90::bounded
