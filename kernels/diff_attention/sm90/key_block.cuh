#pragma once

// Which keys a block of the backward owns, and which tiles of queries see them.

#include "../../common/sequences.cuh"
#include "backward.h"

namespace coda::kernels::sm90 {

struct BlockPlace {
  int block, sequence, kv_head;  // of a packed batch: a block of keys of all sequences, 0
};

// Units (a KV head of a sequence, or of a whole packed batch) go in sections of as many blocks as run at a time, which then meet in the L2
// cache what others of their unit have brought. In a section the blocks that most queries see start first, if attention is causal.
__device__ inline BlockPlace find_block(const BackwardArguments& p) {
  const unsigned kv_heads = p.kv_heads, all = kv_heads * (p.cu_seqlens_k ? 1u : static_cast<unsigned>(p.sequences));
  const unsigned blocks = gridDim.x / all, size = p.section * blocks;
  const unsigned first = blockIdx.x / size * p.section, within = blockIdx.x % size, units = min(all - first, p.section);
  const unsigned unit = first + within % units;
  return {static_cast<int>(within / units), static_cast<int>(unit / kv_heads), static_cast<int>(unit % kv_heads)};
}

// What a block computes, and what it needs of the queries that see it.
struct KeyBlock {
  int64_t key0;        // first key of the sequence, over all sequences
  int share;           // of theta_partial, where D 64 has two for each
  int sequence;        // of the tensor maps, as are:
  int key_token, query_token;  // the block's first key, the sequence's first query
  int kv_head, begin;  // first key of the block, within the sequence
  int queries, keys;   // of the sequence
  int query_tile0;     // first tile of the sequence
  int first, tiles;    // tiles from the first one that sees a key of the block
  int shift;           // query i sees the keys up to i + shift

  __device__ void find(const BackwardArguments& p) {
    const BlockPlace item = find_block(p);
    kv_head = item.kv_head;
    if (p.cu_seqlens_k) {
      share = item.block;
      const Tile where = find_tile(p.sequences, share, kKeyBlock, [&](int64_t n) { return p.cu_seqlens_k[n]; });
      const int64_t query0 = p.cu_seqlens_q[where.sequence];
      key0 = p.cu_seqlens_k[where.sequence];
      keys = static_cast<int>(p.cu_seqlens_k[where.sequence + 1] - key0);
      queries = static_cast<int>(p.cu_seqlens_q[where.sequence + 1] - query0);
      query_tile0 = static_cast<int>(query0 / kQueryTile + where.sequence);
      begin = static_cast<int>(where.begin);
      sequence = 0;
      key_token = static_cast<int>(key0) + begin;
      query_token = query_tile0 * kQueryTile;
    } else {
      sequence = item.sequence;
      share = item.block * static_cast<int>(p.sequences) + sequence;
      begin = item.block * kKeyBlock;
      keys = static_cast<int>(p.length_k);
      queries = static_cast<int>(p.length_q);
      key0 = sequence * p.length_k;
      query_tile0 = sequence * static_cast<int>(p.tiles / p.sequences);
      key_token = begin;
      query_token = 0;
    }
    shift = p.causal ? keys - queries : keys;
    first = begin > shift ? (begin - shift) / kQueryTile : 0;
    tiles = (queries + kQueryTile - 1) / kQueryTile - first;
  }
};

// A tile of queries: number `tile` of its sequence, in one head.
struct TilePlace {
  int head, tile;

  __device__ void advance(int first, int end) {
    const bool last = ++tile == end;
    head += last;
    tile = last ? first : tile;
  }
};

}  // namespace coda::kernels::sm90
