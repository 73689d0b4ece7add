#pragma once

// What a block attends at a time, and the shared memory that its warps hand it on in. README.md has the roles.

#include <algorithm>

#include "../../common/hopper.cuh"
#include "../../common/launch.cuh"
#include "../../common/tensor_map.h"
#include "../chunk_view.cuh"

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
  int group;    // query heads of a KV head
  bool turned;  // the bank meets other queries than the window
  float logit_scale, log2_scale, inverse_scale, eps;
  CUtensorMap k_map, v_map;
};

// 64 query rows of a warpgroup's or two neighbouring sets of them, of one chunk and KV head. Tokens are counted from the first new
// one of the sequence; those before it are in the ring.
struct Item {
  int sequence, snapshot, kv_head;
  uint32_t token0;   // first new token of the sequence, over all sequences
  uint32_t line0;    // token * H + head of the chunk's first row
  int row0, rows;    // first row of the item, and rows of its chunk
  int chunk_start;   // token; negative where the chunk began before the call
  int chunk_end;     // one past its last new token
  int window_begin;  // first token that the window holds
  int ring_begin;    // the slot that holds it, if it is in the ring
  int seen;          // keys of the window before the chunk's first new token
  int keys;          // keys of the window that the item's last row sees
  int bank_tiles;
  int tiles;  // of bank and window; 0 ends the block
};

template <class T, int D, int Streams>
struct Shared {
  static constexpr int kStages = stages(D);
  alignas(1024) T q[kQuerySets][kConsumers][kRows * D];
  alignas(1024) T k[kStages][kKeys * D];
  alignas(1024) T v[kStages][kKeys * D];
  alignas(16) float second[Streams == 2 ? kRows * D : 4];  // lam o2 on its way to the first stream, as registers lie
  alignas(16) float bias[kStages][kKeys];                  // of the bank's slots, as a share of the logit before its scale
  alignas(16) Angle<float> bank_angles[D / 2];
  alignas(16) float norm_weight[D];
  Item item[kQuerySets];           // each beside its first set of queries
  Item brought[2 * hopper::kWarpgroup / kWarp];  // what each of the other warps is at: registers are few
  uint64_t q_full[kQuerySets], q_empty[kQuerySets];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// A warp calls f(item) for the items of this block in order, with `item` filled in. All row tiles and KV heads of a chunk stand together, so that the blocks at work
// share its keys, and those of its neighbours, in the L2 cache.
template <class F>
__device__ inline void for_items(const Arguments& p, Item& to, int item_rows, F f) {
  const auto snapshot_of = [&](unsigned index) { return static_cast<int>(index / p.row_tiles / p.kv_heads); };
  for (unsigned index = blockIdx.x; index < p.items;) {
    const int64_t n = sequence_of_row(p, snapshot_of(index));
    const Span span(p.cu_seqlens, p.tokens_seen, n, p.chunk);
    const int row0 = static_cast<int>(span.row0), chunks = static_cast<int>(span.chunks), length = static_cast<int>(span.length);
    const int next = static_cast<int>(n + 1 < p.sequences ? p.cu_seqlens[n + 1] / p.chunk + 2 * (n + 1) : p.chunk_rows);
    const int into_chunk = static_cast<int>(span.first % p.chunk), into_ring = static_cast<int>(span.first % p.window);
    const int in_ring = static_cast<int>(min(span.first, static_cast<int64_t>(p.window)));
    for (; index < p.items && snapshot_of(index) < next; index += gridDim.x) {
      Item item;
      item.snapshot = snapshot_of(index);
      const int chunk = item.snapshot - row0;
      if (chunk >= chunks) continue;
      item.sequence = static_cast<int>(n);
      item.kv_head = static_cast<int>(index / p.row_tiles % p.kv_heads);
      item.token0 = static_cast<uint32_t>(span.token0);
      item.chunk_start = chunk * p.chunk - into_chunk;
      item.chunk_end = min(item.chunk_start + p.chunk, length);
      const int token = max(item.chunk_start, 0);
      item.line0 = (item.token0 + token) * p.heads + item.kv_head * p.group;
      item.row0 = static_cast<int>(index % p.row_tiles) * item_rows;
      item.rows = (item.chunk_end - token) * p.group;
      if (item.row0 >= item.rows) continue;
      item.window_begin = max(item.chunk_start - (p.window - p.chunk), -in_ring);
      item.ring_begin = into_ring + item.window_begin + (into_ring + item.window_begin < 0 ? p.window : 0);
      item.seen = token - item.window_begin;
      item.keys = item.seen + (min(item.row0 + item_rows, item.rows) - 1) / p.group + 1;
      item.bank_tiles = (p.exact_slots + p.summary_slots + kKeys - 1) / kKeys;
      item.tiles = item.bank_tiles + (item.keys + kKeys - 1) / kKeys;
      __syncwarp();
      if (lane_id() == 0) to = item;
      __syncwarp();
      f(to);
    }
  }
}

}  // namespace coda::kernels::sm90::bounded
