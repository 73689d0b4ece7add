#pragma once

// What a block attends at a time, and the shared memory that its warps hand it on in. README.md has the roles.

#include <algorithm>

#include "../../common/hopper.cuh"
#include "../../common/launch.cuh"
#include "../../common/ring.cuh"
#include "../../common/rotation.cuh"
#include "../../common/tensor_map.h"
#include "../chunk_rows.cuh"

namespace coda::kernels::sm90::bounded {

constexpr int kRows = 64;       // query rows of a consumer warpgroup
constexpr int kConsumers = 2;   // warpgroups
constexpr int kKeys = 128;      // of a tile
constexpr int kQuerySets = 2;   // queries as the bank meets them, and as the window does

// Tiles of keys, and of values, in shared memory.
constexpr int stages(int dim) { return dim == 64 ? 4 : 2; }
// With two streams both warpgroups have the same rows.
constexpr int item_rows(int streams) { return kRows * kConsumers / streams; }

struct Arguments : BoundedAttentionForward {
  unsigned row_tiles;  // of a chunk and KV head
  unsigned items;
  int group;                // query heads of a KV head
  uint32_t group_inverse;   // of 2^32
  bool turned;              // the bank meets other queries than the window
  float logit_scale, log2_scale, inverse_scale, eps;
  int64_t summary_rows;  // of keys, and of values, in summary_rounded
  CUtensorMap k_map, v_map;

  // r / group and r % group for rows of an item, without a division.
  struct TokenHead {
    int token, head;
  };
  __device__ TokenHead split(int r) const {
    const int token = group == 1 ? r : static_cast<int>(__umulhi(r, group_inverse));
    return {token, r - token * group};
  }
};

// 64 query rows, or 128 with one stream, of one chunk and KV head. Tokens are counted from the first new one of the sequence; those
// before it are in the ring.
struct Item {
  int snapshot, kv_head;
  uint32_t line0;    // token * H + head of the chunk's first row
  int row0, rows;    // first row of the item, and rows of its chunk
  int chunk_start;   // negative where the chunk began before the call
  int chunk_end;     // one past its last new token
  int window_begin;  // first token that the window holds
  int ring_begin;    // the slot that holds it, if it is in the ring
  int seen;          // keys of the window before the chunk's first new token
  int keys;          // keys of the window that the item's last row sees
  int bank_tiles;
  int tiles;  // of bank and window; 0 ends the block
};

// kAngles among those that bring queries, the others among those that attend; kTurn is the first of two, one for each warpgroup.
enum NamedBarrier { kSecondFull = 1, kSecondEmpty, kAngles, kTurn };

// An item and its sequence, as a warp that brings them keeps it in shared memory: such warps have few registers.
struct Place : Item {
  int sequence;
  uint32_t token0;             // over all sequences
  int length;                  // new tokens
  int row0_of_sequence;        // its first chunk row
  int chunks;                  // chunk rows in use
  int next;                    // first chunk row of the next sequence
  int into_chunk, into_ring;   // position of the first new token, modulo C and W
  int in_ring;                 // tokens before it that the ring may hold
};

template <class T, int D, int Streams>
struct Shared {
  static constexpr int kStages = stages(D);
  alignas(1024) T q[kQuerySets][kConsumers][kRows * D];
  alignas(1024) T k[kStages][kKeys * D];
  alignas(1024) T v[kStages][kKeys * D];
  alignas(128) unsigned char exchange[kRows * D * 4];      // outputs on their way: see Attend::finish
  alignas(16) float bias[kStages][kKeys];                  // of the bank's slots, as a share of the logit before its scale
  alignas(16) Angle<float> bank_angles[D / 2];
  alignas(16) float norm_weight[D];
  Item item[kQuerySets];  // each beside its first set of queries
  Place place[2 * hopper::kWarpgroup / kWarp];
  uint64_t q_full[kQuerySets], q_empty[kQuerySets];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// A warp calls f() for the items of this block in order, with `at` filled in. All row tiles and KV heads of a chunk stand together, so
// that the blocks at work share its keys, and those of its neighbours, in the L2 cache.
template <class F>
__device__ inline void for_items(const Arguments& p, Place& at, int item_rows, F f) {
  at.next = 0;
  for (unsigned index = blockIdx.x; index < p.items; index += gridDim.x) {
    const unsigned tile_row = index / p.row_tiles;
    const int snapshot = static_cast<int>(tile_row / static_cast<unsigned>(p.kv_heads));
    const int kv_head = static_cast<int>(tile_row % static_cast<unsigned>(p.kv_heads));
    __syncwarp();
    if (snapshot >= at.next) {
      const int64_t n = sequence_of_row(p, snapshot);
      const Span span(p.cu_seqlens, p.tokens_seen, n, p.chunk);
      __syncwarp();
      at.sequence = static_cast<int>(n);
      at.token0 = static_cast<uint32_t>(span.token0);
      at.length = static_cast<int>(span.length);
      at.row0_of_sequence = static_cast<int>(span.row0);
      at.chunks = static_cast<int>(span.chunks);
      at.next = static_cast<int>(n + 1 < p.sequences ? p.cu_seqlens[n + 1] / p.chunk + 2 * (n + 1) : p.chunk_rows);
      at.into_chunk = static_cast<int>(span.first % p.chunk);
      at.into_ring = static_cast<int>(span.first % p.window);
      at.in_ring = static_cast<int>(min(span.first, static_cast<int64_t>(p.window)));
      __syncwarp();
    }
    const int chunk = snapshot - at.row0_of_sequence;
    if (chunk >= at.chunks) continue;
    const int start = chunk * p.chunk - at.into_chunk, token = max(start, 0), end = min(start + p.chunk, at.length);
    const int row0 = static_cast<int>(index % p.row_tiles) * item_rows, rows = (end - token) * p.group;
    if (row0 >= rows) continue;
    const int window_begin = max(start - (p.window - p.chunk), -at.in_ring), slot = at.into_ring + window_begin;
    const int seen = token - window_begin, keys = seen + (min(row0 + item_rows, rows) - 1) / p.group + 1;
    const int bank_tiles = (p.exact_slots + p.summary_slots + kKeys - 1) / kKeys;
    static_cast<Item&>(at) = {snapshot, kv_head, (at.token0 + token) * p.heads + kv_head * p.group, row0, rows, start, end,
                              window_begin, slot < 0 ? slot + p.window : slot, seen, keys, bank_tiles,
                              bank_tiles + (keys + kKeys - 1) / kKeys};
    __syncwarp();
    f();
  }
}

}  // namespace coda::kernels::sm90::bounded
