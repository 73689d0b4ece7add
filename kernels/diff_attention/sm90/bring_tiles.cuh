#pragma once

// What a block of the forward attends at a time, its shared memory, and the warp that brings queries, keys and values to it.

#include "../../common/launch.cuh"
#include "../../common/rotation.cuh"
#include "../../common/tensor_map.h"
#include "../../common/wgmma.cuh"
#include "schedule.h"
#include "tiles.cuh"

namespace coda::kernels::sm90 {

constexpr int kRows = 64;      // query rows of a warpgroup
constexpr int kConsumers = 2;  // warpgroups

// Keys of a tile: as many as registers hold logits for.
constexpr int tile_keys(int dim) { return dim == 64 ? 192 : 128; }

struct ForwardArguments : DiffAttentionForward {
  Schedule schedule;
  CUtensorMap q_map, k_map, v_map;
};

constexpr int kNoWork = -1;

// What a block attends at a time. The producer looks it up, and tells the consumers with the queries.
struct Work {
  int query0, key0;  // first token of the sequence, in the token dimension of a tensor map
  int queries, keys;
  int begin;        // first token of the tile, within the sequence
  int64_t output0;  // first token of the sequence over all sequences
  int sequence, kv_head, head;
  int key_tiles;  // 0 where no row of the tile sees a key, kNoWork after the last item
  bool causal;

  __device__ Work(const ForwardArguments& p, const Item& item, int tokens, int key_tile) : causal(p.causal) {
    kv_head = item.kv_head;
    head = item.head;
    if (p.cu_seqlens_q) {
      const Tile tile = find_tile(p.sequences, item.tile, tokens, [&](int64_t n) { return p.cu_seqlens_q[n]; });
      const int64_t n = tile.sequence;
      sequence = 0;
      output0 = p.cu_seqlens_q[n];
      query0 = static_cast<int>(output0);
      key0 = static_cast<int>(p.cu_seqlens_k[n]);
      queries = static_cast<int>(p.cu_seqlens_q[n + 1]) - query0;
      keys = static_cast<int>(p.cu_seqlens_k[n + 1]) - key0;
      begin = static_cast<int>(tile.begin);
    } else {
      sequence = item.sequence;
      query0 = key0 = 0;
      output0 = sequence * p.length_q;
      queries = static_cast<int>(p.length_q);
      keys = static_cast<int>(p.length_k);
      begin = static_cast<int>(item.tile) * tokens;
    }
    key_tiles = begin < queries ? (visible(min(begin + tokens, queries) - 1) + key_tile - 1) / key_tile : 0;
  }

  // Leading keys that a token sees.
  __device__ int visible(int token) const {
    return causal ? min(max(token + keys - queries + 1, 0), keys) : keys;
  }
};

template <class T, int D, int Streams>
struct ForwardShared {
  static constexpr int kTokens = kRows * kConsumers / Streams;
  static constexpr int kKeys = tile_keys(D);
  static constexpr int kStages = D == 64 && Streams == 2 ? 3 : 2;  // tiles of keys, and of values
  alignas(1024) T q[kTokens * D];
  alignas(1024) T k[kStages][kKeys * D];
  alignas(1024) T v[kStages][kKeys * D];
  alignas(16) float second[Streams == 2 ? kRows * D : 4];  // lam o2 on its way to the first stream, as registers lie: [i][thread]
  Angle<float> theta[D / 2];
  Work work;
  uint64_t q_full, q_empty, second_full, second_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <class T, int D, int Streams>
__device__ inline void bring_tiles(const ForwardArguments& p, ForwardShared<T, D, Streams>& shared) {
  using namespace hopper;
  using Shared = ForwardShared<T, D, Streams>;
  constexpr int kTokens = Shared::kTokens, kKeys = Shared::kKeys;
  prefetch_map(&p.q_map);
  if (p.keys > 0) {
    prefetch_map(&p.k_map);
    prefetch_map(&p.v_map);
  }
  hopper::RingPosition<Shared::kStages> at;
  uint32_t q_parity = 0;
  for (unsigned round = 0; round < p.schedule.rounds; ++round) {
    Item item;
    if (!find_item(p.schedule, p, round, item)) continue;
    const Work work(p, item, kTokens, kKeys);
    if (work.begin >= work.queries) continue;
    wait(&shared.q_empty, q_parity ^ 1);
    q_parity ^= 1;
    shared.work = work;
    if (work.key_tiles == 0) {
      arrive(&shared.q_full);
      continue;
    }
    arrive_expect(&shared.q_full, sizeof(shared.q));
    for (int panel = 0; panel < D / 64; ++panel) {
      load_box(shared.q + panel * kTokens * 64, &p.q_map, &shared.q_full, panel * 64, work.head,
               work.query0 + work.begin, work.sequence);
    }
    for (int tile = work.key_tiles - 1; tile >= 0; --tile, at.advance()) {
      const auto bring = [&](T* to, const CUtensorMap& map, uint64_t* full, uint64_t* empty) {
        wait(empty, at.parity ^ 1);
        arrive_expect(full, kKeys * D * sizeof(T));
        for (int panel = 0; panel < D / 64; ++panel) {
          load_box(to + panel * kKeys * 64, &map, full, panel * 64, work.kv_head,
                   work.key0 + tile * kKeys, work.sequence);
        }
      };
      bring(shared.k[at.stage], p.k_map, &shared.k_full[at.stage], &shared.k_empty[at.stage]);
      bring(shared.v[at.stage], p.v_map, &shared.v_full[at.stage], &shared.v_empty[at.stage]);
    }
  }
  wait(&shared.q_empty, q_parity ^ 1);
  shared.work.key_tiles = kNoWork;
  arrive(&shared.q_full);
}

}  // namespace coda::kernels::sm90
