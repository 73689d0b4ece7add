#pragma once

#include <algorithm>

#include "../../common/sequences.cuh"
#include "../params.h"

namespace coda::kernels::sm90 {

// The order in which query tiles are attended. A unit is what shares keys and values: one KV head of a sequence, or of a whole packed
// batch. Units go in sections whose keys and values fit the L2 cache together; in a section the tiles that see most keys come first,
// so that the last ones to run are short.
struct Schedule {
  unsigned items;    // tiles of all query heads
  unsigned tiles;    // of one query head of a unit
  unsigned units;
  unsigned section;  // units in a section
};

constexpr int64_t kSectionBytes = 16 << 20;

inline Schedule make_schedule(const DiffAttentionParams& p, int tile_tokens) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles = packed ? tile_bound(p.queries, p.sequences, tile_tokens) : (p.length_q + tile_tokens - 1) / tile_tokens;
  const int64_t units = packed ? p.kv_heads : p.sequences * p.kv_heads;
  const int64_t unit_bytes = std::max<int64_t>(4 * p.dim * (packed ? p.keys : p.length_k), 1);
  const int64_t section = std::clamp<int64_t>(kSectionBytes / unit_bytes, 1, std::max<int64_t>(units, 1));
  return {static_cast<unsigned>(tiles * units * (p.heads / p.kv_heads)), static_cast<unsigned>(tiles), static_cast<unsigned>(units),
          static_cast<unsigned>(section)};
}

struct Item {
  unsigned tile;
  int sequence;  // 0 in a packed batch, whose tiles run over all sequences
  int kv_head, head;
};

__device__ inline Item find_item(const Schedule& s, const DiffAttentionParams& p, unsigned index) {
  const unsigned kv_heads = p.kv_heads, group = p.heads / kv_heads;
  const unsigned section_items = s.section * s.tiles * group;
  const unsigned first = index / section_items * s.section, within = index % section_items;
  const unsigned units = min(s.units - first, s.section);
  const unsigned row = within / group, unit = first + row % units, kv_head = unit % kv_heads;
  return {s.tiles - 1 - row / units, static_cast<int>(unit / kv_heads), static_cast<int>(kv_head),
          static_cast<int>(kv_head * group + within % group)};
}

}  // namespace coda::kernels::sm90
