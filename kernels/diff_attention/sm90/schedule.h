#pragma once

#include <algorithm>

#include "../../common/sequences.cuh"
#include "../params.h"

namespace coda::kernels::sm90 {

// The order in which query tiles are attended. A unit is what shares keys and values: one KV head of a sequence, or of a whole
// packed batch. Units go in sections whose keys and values fit the L2 cache together; in a section the tiles that see most keys
// come first. Blocks attend a tile each in every round, and every other round runs backwards: the block that had the longest tile
// of one gets the shortest. Where tiles differ much a section begins a new round, so that what its last one lacks are short tiles,
// and from one section to the next blocks change places, so that not always the same ones have too much.
struct Schedule {
  unsigned tiles;    // of one query head of a unit
  unsigned units;
  unsigned section;  // units in a section
  unsigned places;   // of a section, for its tiles or a few more
  unsigned shift;    // of places from section to section
  unsigned blocks, rounds;
};

constexpr int64_t kSectionBytes = 16 << 20;
constexpr int64_t kLeastRounds = 4;  // of a section
constexpr int64_t kManyTiles = 8;    // of a query head: the longest is much longer than the shortest

inline Schedule make_schedule(const DiffAttentionParams& p, int tile_tokens, int multiprocessors) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles = packed ? tile_bound(p.queries, p.sequences, tile_tokens) : (p.length_q + tile_tokens - 1) / tile_tokens;
  const int64_t units = packed ? p.kv_heads : p.sequences * p.kv_heads;
  const int64_t unit_tiles = tiles * (p.heads / p.kv_heads);
  const int64_t unit_bytes = std::max<int64_t>(4 * p.dim * (packed ? p.keys : p.length_k), 1);
  const int64_t blocks = std::min<int64_t>(units * unit_tiles, multiprocessors);
  const int64_t least = (kLeastRounds * blocks + unit_tiles - 1) / unit_tiles;
  const int64_t section = std::min(std::max(kSectionBytes / unit_bytes, least), units);
  const auto whole_rounds = [&](int64_t places) { return (places + blocks - 1) / blocks; };
  const bool differ = p.causal && !packed && tiles >= kManyTiles;
  const int64_t places = differ ? whole_rounds(section * unit_tiles) * blocks : section * unit_tiles;
  const int64_t rounds = whole_rounds((units + section - 1) / section * places);
  const auto narrow = [](int64_t x) { return static_cast<unsigned>(x); };
  return {narrow(tiles),  narrow(units),  narrow(section), narrow(places), narrow(differ ? blocks / 4 : 0),
          narrow(blocks), narrow(rounds)};
}

struct Item {
  unsigned tile;
  int sequence;  // 0 in a packed batch, whose tiles run over all sequences
  int kv_head, head;
};

// The tile of this block in a round; false where there is none.
__device__ inline bool find_item(const Schedule& s, const DiffAttentionParams& p, unsigned round, Item& item) {
  const unsigned kv_heads = p.kv_heads, group = p.heads / kv_heads, first = round * s.blocks;
  const unsigned block = (blockIdx.x + first / s.places * s.shift) % s.blocks;
  const unsigned place = first + (round % 2 ? s.blocks - 1 - block : block);
  const unsigned unit0 = place / s.places * s.section, within = place % s.places;
  if (unit0 >= s.units) return false;
  const unsigned units = min(s.units - unit0, s.section);
  const unsigned row = within / group, unit = unit0 + row % units, kv_head = unit % kv_heads;
  item = {s.tiles - 1 - row / units, static_cast<int>(unit / kv_heads), static_cast<int>(kv_head),
          static_cast<int>(kv_head * group + within % group)};
  return row < s.tiles * units;
}

}  // namespace coda::kernels::sm90
