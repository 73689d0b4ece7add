#pragma once

#include "../../common/mma.cuh"
#include "items.cuh"

namespace coda::kernels::sm90::bounded {

// The angle of a phase in radians, in float64 reduced to [-pi, pi], where the approximate sine and cosine are good to 2^-20: far below
// what rounding a query costs.
__device__ inline Angle<float> angle_of_phase(double phase) {
  const double turns = phase * 0.15915494309189535;
  const float x = static_cast<float>((turns - rint(turns)) * 6.283185307179586);
  return {__cosf(x), __sinf(x)};
}

// Absolute errors of 2^-21, which in a logit are far below what rounding its operands costs.
__device__ inline float log_sigmoid_approximate(float z) { return fminf(z, 0.0f) - __logf(1.0f + __expf(-fabsf(z))); }

__device__ inline Angle<float> angle_of_theta(float theta) {
  const float turns = rintf(theta * 0.15915494f);
  const float x = fmaf(turns, 1.7484555e-7f, fmaf(turns, -6.2831855f, theta));
  return {__cosf(x), __sinf(x)};
}

// One warp that brings: a quarter of the queries of each item, or of the rows of each tile of keys and values.
template <class T, int D, int Streams>
struct Bring {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kPackets = D / kPacket;         // of a row
  static constexpr int kRowsAtOnce = kWarp / kPackets;  // rows of one copy of the warp
  static_assert(kBringers * kWarp == kKeys, "a lane knows one row of a tile");
  const Arguments& p;
  Memory& shared;
  const int warp;
  Place& place;

  __device__ Bring(const Arguments& arguments, Memory& memory, int n)
      : p(arguments), shared(memory), warp(n % kBringers), place(memory.place[n]) {}

  template <int Rows>
  __device__ static unsigned char* packet_of(T* tile, int row, int packet) {
    return reinterpret_cast<unsigned char*>(tile) + packet / 8 * Rows * 128 + hopper::swizzled(row, packet % 8);
  }

  // Two packets of a row that are half a row apart, and so both elements of every plane of either pairing.
  static constexpr int kParts = D / 16;  // lanes of a row
  struct Planes {
    float x[2][kPacket];
    template <int Rows>
    __device__ void load(T* tile, int row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) load_packet(x[i], reinterpret_cast<const T*>(packet_of<Rows>(tile, row, lane_id() % kParts + i * kParts)));
    }
    template <int Rows>
    __device__ void store(T* tile, int row) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) store_packet(reinterpret_cast<T*>(packet_of<Rows>(tile, row, lane_id() % kParts + i * kParts)), x[i]);
    }
    __device__ static void turn_plane(float& a, float& b, Angle<float> by) {
      const float turned = fmaf(a, by.cos, -(b * by.sin));
      b = fmaf(a, by.sin, b * by.cos);
      a = turned;
    }
    template <class AngleOf>
    __device__ void turn(bool interleaved, AngleOf angle_of_pair) {
      const int part = lane_id() % kParts;
      if (interleaved) {
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
          turn_plane(x[i / 4][i % 4 * 2], x[i / 4][i % 4 * 2 + 1], angle_of_pair(4 * part + i / 4 * (D / 4) + i % 4));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPacket; ++i) turn_plane(x[0][i], x[1][i], angle_of_pair(8 * part + i));
      }
    }
  };

  // Copies belong to the generic proxy, and wgmma reads through the asynchronous one: each lane waits for its own and fences.
  __device__ static void announce(uint64_t* full) {
    hopper::fence_async_proxy();
    __syncwarp();
    if (lane_id() == 0) hopper::arrive(full);
  }

};

template <class T, int D, int Streams>
struct BringQueries : Bring<T, D, Streams> {
  using Base = Bring<T, D, Streams>;
  using typename Base::Memory;
  using typename Base::Planes;
  using Base::p, Base::shared, Base::warp, Base::place, Base::kPackets, Base::kRowsAtOnce, Base::kParts, Base::announce;
  static constexpr int kShare = Memory::kRows / kBringers, kOfWarpgroup = Memory::kRows / kConsumers;
  int sets = 0;
  int theta_head = -1;

  __device__ BringQueries(const Arguments& arguments, Memory& memory, int n) : Base(arguments, memory, n) {}

  // The next set of queries: those of item number n, zeros past the end of the chunk, turned if for the bank, and R_theta of them. Also
  // their lambdas and the angles of the turn; and what the item is, or that there is none.
  __device__ void bring(int n, bool found, bool bank) {
    const Item& item = place.item[0];
    const int set = sets % kQuerySets;
    hopper::wait(&shared.q_empty[set], sets / kQuerySets % 2 ^ 1);
    if (found) {
      const int packet = lane_id() % kPackets;
#pragma unroll 1
      for (int i = warp * kShare + lane_id() / kPackets; i < (warp + 1) * kShare; i += kRowsAtOnce) {
        ampere::copy_packet(Base::template packet_of<64>(shared.q[set][i / kOfWarpgroup], product_row<Streams>(i % kOfWarpgroup), packet),
                            static_cast<const T*>(p.q) + line_of(item, i) * D + packet * kPacket, item.row0 + i < item.rows);
      }
      if (Streams == 2 && lane_id() < kShare) {
        const int i = warp * kShare + lane_id();
        ampere::copy_word(&shared.lam[n % kItems][i], static_cast<const float*>(p.lam) + line_of(item, i), item.row0 + i < item.rows);
      }
      if ((p.turns_keys || p.turns_queries) && lane_id() < D / 2 / kBringers) {
        const int pair = warp * (D / 2 / kBringers) + lane_id();
        shared.bank_angles[n % kItems][pair] =
            angle_of_phase(mul_rn(static_cast<double>(p.bank_distance - item.position), __ldg(p.inv_freq + pair)));
      }
      if (Streams == 2 && item.kv_head != theta_head && p.group <= kThetas) write_theta(item.kv_head);
    }
    if (warp == 0 && lane_id() == 0) {
      shared.item[n % kItems] = item;
      if (!found) shared.item[n % kItems].tiles = 0;
    }
    ampere::commit_copies();
    // The angles of all four warps came with the item's first set.
    if (bank) hopper::wait(&shared.q_full[(sets - 1) % kQuerySets], (sets - 1) / kQuerySets % 2);
    ampere::wait_copies<0>();
    __syncwarp();
    if (found && (Streams == 2 || bank)) {
#pragma unroll 1
      for (int i = warp * kShare + lane_id() / kParts; i < (warp + 1) * kShare; i += kWarp / kParts) {
        T* const tile = shared.q[set][i / kOfWarpgroup];
        const int row = product_row<Streams>(i % kOfWarpgroup);
        Planes x;
        x.template load<64>(tile, row);
        if (bank) {
          const Angle<float>* angles = shared.bank_angles[n % kItems];
          x.turn(p.rope_interleaved, [&](int pair) { return angles[pair]; });
          x.template store<64>(tile, row);
        }
        if (Streams == 2) {
          const int head = p.split(item.row0 + i).head;
          if (p.group <= kThetas) {
            const Angle<float>* angles = shared.theta + head * Memory::kThetaStride;
            x.turn(p.theta_interleaved, [&](int pair) { return angles[pair]; });
          } else {
            const float* angles = static_cast<const float*>(p.theta) + (item.kv_head * p.group + head) * (D / 2);
            x.turn(p.theta_interleaved, [&](int pair) { return angle_of_theta(__ldg(angles + pair)); });
          }
          x.template store<64>(tile, row + 8);
        }
      }
    }
    announce(&shared.q_full[set]);
    ++sets;
  }

  // By all warps that bring queries, when they come to another KV head.
  __device__ void write_theta(int kv_head) {
    theta_head = kv_head;
    hopper::sync_threads(kTheta, kBringers * kWarp);
    for (int i = threadIdx.x % hopper::kWarpgroup; i < p.group * (D / 2); i += kBringers * kWarp) {
      shared.theta[i / (D / 2) * Memory::kThetaStride + i % (D / 2)] =
          angle_of_theta(__ldg(static_cast<const float*>(p.theta) + kv_head * p.group * (D / 2) + i));
    }
    hopper::sync_threads(kTheta, kBringers * kWarp);
  }

  // Of row i of an item. Past the end of the chunk it is never read.
  __device__ int64_t line_of(const Item& item, int i) const {
    const auto at = p.split(item.row0 + i);
    return item.line0 + static_cast<uint32_t>(at.token * p.heads + at.head);
  }

  __device__ void run() {
    start_items(p, place);
    bool found = true, follows = false;
#pragma unroll 1
    for (int n = 0; found; ++n) {
      found = find_item(p, place, Memory::kRows, place.item[0], follows);
      follows = place.item[0].followed;
#pragma unroll 1
      for (int bank = 0; bank <= (found && p.turns_queries); ++bank) bring(n, found, bank);
    }
  }
};

// Keys, and a tile behind them values.
template <class T, int D, int Streams>
struct BringKeys : Bring<T, D, Streams> {
  using Base = Bring<T, D, Streams>;
  using typename Base::Memory;
  using typename Base::Planes;
  using Base::p, Base::shared, Base::warp, Base::place, Base::kPackets, Base::kRowsAtOnce, Base::kParts, Base::announce;
  KnownRows& known;
  Ring<Memory::kStages> ring;
  int tiles = 0, tiles_with_values = 0;  // that have been brought

  __device__ BringKeys(const Arguments& arguments, Memory& memory, int n) : Base(arguments, memory, n), known(memory.known[n]) {}

  __device__ static BankRow no_row() { return {nullptr, nullptr, neg_inf<float>()}; }
  __device__ static BankRow row_at(const void* keys, const void* values, int64_t row) {
    return {static_cast<const T*>(keys) + row * D, static_cast<const T*>(values) + row * D, 0.0f};
  }
  // Rows of (N, Hkv, W + Me) and (T, Hkv).
  __device__ int64_t state_row(const Item& item, int slot) const {
    return static_cast<int64_t>(item.sequence * p.kv_heads + item.kv_head) * (p.window + p.exact_slots) + slot;
  }
  __device__ int64_t token_row(const Item& item, int token) const {
    return static_cast<int64_t>(item.token0 + token) * p.kv_heads + item.kv_head;
  }

  __device__ BankRow bank_row(const Item& item, int slot) const {
    if (slot < p.exact_slots) {
      const int gate_group = p.gate_groups == 1 ? 0 : item.kv_head, held = p.window + p.exact_slots;
      const int source = __ldg(p.index + static_cast<int64_t>(item.snapshot * p.gate_groups + gate_group) * p.exact_slots + slot);
      if (source < 0) return no_row();
      const int token = source - held;
      BankRow row = token < 0 ? row_at(p.state_kbar, p.state_v, state_row(item, source)) : row_at(p.kbar, p.v, token_row(item, token));
      if (p.gate_bias && slot >= p.num_sinks) {
        row.bias = log_sigmoid_approximate(
            token < 0 ? static_cast<const float*>(p.state_gate)[(item.sequence * p.gate_groups + gate_group) * held + source]
                      : static_cast<const float*>(p.gate)[static_cast<int64_t>(item.token0 + token) * p.gate_groups + gate_group]);
      }
      return row;
    }
    slot -= p.exact_slots;
    if (slot >= p.summary_slots) return no_row();
    const float mass = static_cast<const float*>(p.summary_mass)[item.snapshot * p.summary_slots + slot];
    if (!(mass > 0.0f)) return no_row();
    const T* keys = static_cast<const T*>(p.summary_rounded);
    BankRow row = row_at(keys, keys + p.summary_rows * D,
                     static_cast<int64_t>(item.snapshot * p.kv_heads + item.kv_head) * p.summary_slots + slot);
    if (p.mass_bias) row.bias = __logf(mass);
    return row;
  }
  __device__ BankRow window_row(const Item& item, int key) const {
    if (key >= item.keys) return no_row();
    const int token = item.window_begin + key, slot = item.ring_begin + key;
    return token < 0 ? row_at(p.state_k, p.state_v, state_row(item, slot < p.window ? slot : slot - p.window))
                     : row_at(p.k, p.v, token_row(item, token));
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
        const auto* row = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(mine), eight + i));
        ampere::copy_packet(Base::template packet_of<kKeys>(tile, i, packet) + (warp * kWarp + eight) * 128, row + packet * kPacket, row != nullptr);
      }
    }
    ampere::commit_copies();
    ampere::wait_copies<0>();
    __syncwarp();
  }

  // This warp's rows of a tile of item number n's bank, in place: q . R(-a) k = (R(a) q) . k.
  __device__ void turn_keys(T* tile, int n) const {
    const Angle<float>* angles = shared.bank_angles[n % kItems];
#pragma unroll 1
    for (int row = warp * kWarp + lane_id() / kParts; row < (warp + 1) * kWarp; row += kWarp / kParts) {
      Planes x;
      x.template load<kKeys>(tile, row);
      x.turn(p.rope_interleaved, [&](int pair) { return Angle<float>{angles[pair].cos, -angles[pair].sin}; });
      x.template store<kKeys>(tile, row);
    }
  }

  // By the copy engine, from token `token` on over all sequences.
  __device__ void load_tile(T* tile, const CUtensorMap& map, uint64_t* full, int kv_head, int token) {
    if (lane_id() == 0) {
      if (warp == 0) {
        hopper::arrive_expect(full, kKeys * D * sizeof(T));
        for (int panel = 0; panel < D / 64; ++panel) {
          hopper::load_box(tile + panel * kKeys * 64, &map, full, panel * 64, kv_head, token, 0);
        }
      } else {
        hopper::arrive(full);
      }
    }
    __syncwarp();
  }

  __device__ void bring_keys(int n, const Item& item, int tile) {
    const int stage = ring.stage;
    const uint32_t parity = ring.parity() ^ 1;
    const bool bank = tile >= item.window_tiles;
    const int key0 = (bank ? tile - item.window_tiles : tile) * kKeys, token = item.window_begin + key0;
    // The copy engine brings what lies wholly in the chunk and the tokens before it.
    if (!bank && token >= 0 && token + kKeys <= item.chunk_end) {
      hopper::wait(&shared.k_empty[stage], parity);
      load_tile(shared.k[stage], p.k_map, &shared.k_full[stage], item.kv_head, static_cast<int>(item.token0) + token);
      remember({stage, parity, item.kv_head, static_cast<int>(item.token0) + token}, nullptr);
      return;
    }
    const int mine = warp * kWarp + lane_id();
    BankRow row;
    if (!bank) {
      row = window_row(item, key0 + mine);
    } else if (key0 == 0) {
      const BankRow& at = known.bank[item.odd_chunk][lane_id()];
      row.key = at.key;
      row.value = at.value;
      row.bias = at.bias;
    } else {
      row = bank_row(item, key0 + mine);
    }
    hopper::wait(&shared.k_empty[stage], parity);
    if (bank) shared.bias[stage][mine] = row.bias * p.inverse_scale;
    copy_rows(shared.k[stage], static_cast<const T*>(row.key));
    if (bank && p.turns_keys) {
      hopper::wait(&shared.q_full[n % kQuerySets], n / kQuerySets % 2);  // and with it the angles
      turn_keys(shared.k[stage], n);
    }
    announce(&shared.k_full[stage]);
    remember({stage, parity, item.kv_head, -1}, row.value);
  }
  __device__ void remember(const PendingTile& tile, const void* row) {
    known.pending[tiles & 1] = tile;
    known.pending_row[tiles & 1][lane_id()] = row;
    __syncwarp();
    ++tiles;
  }
  // Of the tiles up to there whose keys have been brought.
  __device__ void bring_values(int end) {
    while (tiles_with_values < end) {
      const int slot = tiles_with_values++ & 1;
      const PendingTile& tile = known.pending[slot];
      hopper::wait(&shared.v_empty[tile.stage], tile.parity);
      if (tile.token >= 0) {
        load_tile(shared.v[tile.stage], p.v_map, &shared.v_full[tile.stage], tile.kv_head, tile.token);
      } else {
        copy_rows(shared.v[tile.stage], static_cast<const T*>(known.pending_row[slot][lane_id()]));
        announce(&shared.v_full[tile.stage]);
      }
    }
  }

  __device__ bool find_next(int n, bool follows) {
    const bool found = find_item(p, place, Memory::kRows, place.item[n % 2], follows);
    const Item& item = place.item[n % 2];
    // Known before their tile has a stage.
    if (found && !item.follows && item.tiles > item.window_tiles) {
      known.bank[item.odd_chunk][lane_id()] = bank_row(item, warp * kWarp + lane_id());
    }
    return found;
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      hopper::prefetch_map(&p.k_map);
      hopper::prefetch_map(&p.v_map);
    }
    start_items(p, place);
    bool found = false;
    // Item number n; beside its first keys, or before them all, the rows of the next one's are found.
#pragma unroll 1
    for (int n = -1; n < 0 || found; ++n) {
      const Item& item = place.item[n & 1];
      if (n >= 0) ring.begin(item.follows);
      const int steps = n < 0 ? 1 : item.tiles;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const bool fresh = n >= 0 && ring.fresh(item.follows, step);
        if (n >= 0) ring.advance(fresh);
        if (fresh) {
          // Values are needed later than keys, and their stages are free later.
          bring_keys(n, item, item.backwards ? item.tiles - 1 - step : step);
          bring_values(tiles - 1);
        }
        if (step == 0) found = find_next(n + 1, n >= 0 && item.followed);
      }
      // What follows finds its first keys there, and waits for nothing else.
      if (n >= 0 && (item.followed || !found)) bring_values(tiles);
    }
  }
};

}  // namespace coda::kernels::sm90::bounded
