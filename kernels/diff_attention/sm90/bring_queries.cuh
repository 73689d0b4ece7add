#pragma once

// The shared memory of a block of the backward, and what brings its keys and values and then tile after tile of queries.

#include "../../common/launch.cuh"
#include "../../common/wgmma.cuh"
#include "key_block.cuh"
#include "tiles.cuh"

namespace coda::kernels::sm90 {

constexpr int kOwnKeys = 64;  // keys of a warpgroup

// Whether a warp of its own brings the tiles of queries.
constexpr bool has_producer(int dim) { return dim == 64; }
// Whether the two warpgroups compute products in turn.
constexpr bool take_turns(int dim, int streams) { return dim == 128 && streams == 1; }

template <class T, int D, int Streams>
struct BackwardShared {
  static constexpr int kStages = (D == 64 ? 3 : 2) + (Streams == 1 ? 1 : 0);
  static constexpr int kGradLogits = take_turns(D, Streams) ? kStages : Streams;  // of the last tiles, or of each stream
  struct Stage {
    alignas(1024) T q[Streams][kQueryTile * D];  // q, R_theta q
    alignas(1024) T grad[kQueryTile * D];
  };
  alignas(1024) T k[kKeyBlock * D];  // panels of 32 columns, so that the two of a panel_column panel can be one operand
  alignas(1024) T v[kKeyBlock * D];
  alignas(1024) T grad_logits[kGradLogits][kKeyBlock * kQueryTile];  // rows are keys
  Stage stages[kStages];
  alignas(16) float numbers[kStages][query_numbers(Streams) * kQueryTile];
  alignas(16) float angles[kStages][Streams == 2 ? D : 4];
  // grad_theta of the panel's pairs, by panel_pair, from the queries of each thread.
  alignas(16) float theta_sums[Streams == 2 ? 8 * 2 * hopper::kWarpgroup : 4];
  float theta[2][4][32];  // [warpgroup][warp][pair]
  uint64_t keys_full, full[kStages], empty[kStages];
  KeyBlock block;

  static constexpr uint32_t kKeyBytes = sizeof(k) + sizeof(v);
  static constexpr uint32_t kNumberBytes = query_numbers(Streams) * kQueryTile * sizeof(float);
  static constexpr uint32_t kAngleBytes = Streams == 2 ? D * sizeof(float) : 0;
  static constexpr uint32_t kStageBytes = sizeof(Stage) + kNumberBytes + kAngleBytes;
  static constexpr int kCopies = D / 64 * (Streams + 1) + Streams;  // that bring a tile
};

template <class T, int D, int Streams>
__device__ inline void bring_keys(const BackwardArguments& p, BackwardShared<T, D, Streams>& shared) {
  const KeyBlock& block = shared.block;
  hopper::arrive_expect(&shared.keys_full, shared.kKeyBytes);
  for (int panel = 0; panel < D / 32; ++panel) {
    hopper::load_box(shared.k + panel * kKeyBlock * 32, &p.k_map, &shared.keys_full, panel * 32, block.kv_head, block.key_token,
                     block.sequence);
  }
  for (int panel = 0; panel < D / 64; ++panel) {
    hopper::load_box(shared.v + panel * kKeyBlock * 64, &p.v_map, &shared.keys_full, panel * 64, block.kv_head, block.key_token,
                     block.sequence);
  }
}

// One of the copies that bring a tile to a stage that is free; each tile has all of them.
template <class T, int D, int Streams>
__device__ inline void bring_queries(const BackwardArguments& p, BackwardShared<T, D, Streams>& shared, TilePlace place, int stage,
                                     int copy) {
  constexpr int kPanels = D / 64, kTiles = kPanels * (Streams + 1);
  const KeyBlock& block = shared.block;
  uint64_t* full = &shared.full[stage];
  if (copy == 0) hopper::arrive_expect(full, shared.kStageBytes);
  if (copy < kTiles) {
    const int which = copy / kPanels, panel = copy % kPanels;
    const CUtensorMap* map = which == Streams ? &p.grad_map : which == 0 ? &p.q_map : &p.turned_q_map;
    hopper::load_box(shared.stages[stage].q[0] + which * (kQueryTile * D) + panel * kQueryTile * 64, map, full, panel * 64, place.head,
                     block.query_token + place.tile * kQueryTile, block.sequence);
  } else if (copy == kTiles) {
    const int64_t index = place.head * p.tiles + block.query_tile0 + place.tile;
    hopper::load_bytes(shared.numbers[stage], p.numbers + index * (query_numbers(Streams) * kQueryTile), full, shared.kNumberBytes);
  } else {
    hopper::load_bytes(shared.angles[stage], p.angles + place.head * D, full, shared.kAngleBytes);
  }
}

// The warp that brings all tiles.
template <class T, int D, int Streams>
__device__ inline void bring_all_queries(const BackwardArguments& p, BackwardShared<T, D, Streams>& shared) {
  if (!hopper::elect_thread()) return;
  const KeyBlock& block = shared.block;
  const int count = p.heads / p.kv_heads * block.tiles;
  TilePlace place{block.kv_head * (p.heads / p.kv_heads), block.first};
  hopper::RingPosition<shared.kStages> at;
  for (int n = 0; n < count; ++n, at.advance(), place.advance(block.first, block.first + block.tiles)) {
    hopper::wait(&shared.empty[at.stage], at.parity ^ 1);
    for (int copy = 0; copy < shared.kCopies; ++copy) bring_queries(p, shared, place, at.stage, copy);
  }
}

}  // namespace coda::kernels::sm90
