#pragma once

// What a block attends at a time, and the shared memory that its warps hand it on in. README.md has the roles.

#include <algorithm>

#include "../../common/hopper.cuh"
#include "../../common/launch.cuh"
#include "../../common/ring.cuh"
#include "../../common/rotation.cuh"
#include "../../common/sequences.cuh"
#include "../../common/tensor_map.h"
#include "../chunk_rows.cuh"

namespace coda::kernels::sm90::bounded {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kBringers = 4;   // warps
constexpr int kKeys = 128;     // of a tile
constexpr int kQuerySets = 2;  // of this item and the next
constexpr int kItems = 4;      // that some warp may still be at, one more being found

// Tiles of keys, and of values, in shared memory.
constexpr int stages(int dim) { return dim == 64 ? 4 : 2; }
// Where there are two streams and rows are short, the warps that bring have the time to turn the bank's keys.
constexpr bool may_turn_keys(int dim, int streams) { return dim == 64 && streams == 2; }
// Of a thread that brings. At D 128 two streams take all that those can spare who attend.
constexpr int bring_registers(int dim, int streams) { return dim == 128 && streams == 2 ? 40 : 56; }
constexpr int attend_registers(int dim, int streams) { return (504 - bring_registers(dim, streams)) / 2; }
// A warpgroup's 64 rows of a product are as many query rows with one stream, and with two half of them twice.
constexpr int item_rows(int streams) { return 64 * kConsumers / streams; }

struct Arguments : BoundedAttentionForward {
  unsigned row_tiles;               // of a chunk and KV head
  unsigned whole, shares;           // claims of all row tiles of a chunk and KV head, and of anything
  int group;                        // query heads of a KV head
  uint32_t group_inverse;           // of 2^32
  bool turns_keys, turns_queries;   // to the distance at which queries meet the bank: one of them, or none
  float logit_scale, log2_scale, inverse_scale, eps;
  Divisor by_chunk, by_window;
  int64_t summary_rows;  // of keys, and of values, in summary_rounded
  bool boxed_queries;    // items begin and end with whole tokens
  bool inputs_ready;     // before wait_for_stream, all but turned keys and rounded summaries: see `prepared`
  CUtensorMap q_map, k_map, v_map;

  // r / group and r % group for rows of an item, without a division.
  struct TokenHead {
    int token, head;
  };
  __device__ TokenHead split(int r) const {
    const int token = group == 1 ? r : static_cast<int>(__umulhi(r, group_inverse));
    return {token, r - token * group};
  }
};

// Query rows (token, head of the group) of one chunk and KV head. Tokens are counted from the first new one of the
// sequence; those before it are in the ring. Tiles of keys: the window's from its first position on, then the bank's,
// or all of them backwards.
struct alignas(16) Item {
  uint32_t line0;  // token * H + head of the chunk's first row
  int row0, rows;  // first row of the item, and rows of its chunk
  int seen;        // keys of the window before the chunk's first new token
  int kv_head;
  int window_tiles;  // those that the item's last row sees
  int tiles;         // of window and bank; 0 ends the block
  int flags;
  // Tiles from the last one on; the item before, or after, has the same tiles the other way round; the copy engine does
  // not bring all of the window's.
  static constexpr int kBackwards = 1, kFollows = 2, kFollowed = 4, kCopied = 8;

  int sequence, snapshot;
  uint32_t token0;   // of the sequence, over all sequences
  int chunk_end;     // one past its last new token
  int window_begin;  // first token that the window holds
  int ring_begin;    // the slot that holds it, if it is in the ring
  int keys;          // keys of the window
  int first_token;   // of the chunk, over all sequences
  int chunk_slot;    // where its angles are
  int64_t position;  // of the chunk's first token in the sequence
};

constexpr int kItemWords = sizeof(Item) / 4;
static_assert(kItemWords <= kWarp);
__device__ inline uint32_t* words_of(Item& item) { return reinterpret_cast<uint32_t*>(&item); }
__device__ inline const uint32_t* words_of(const Item& item) { return reinterpret_cast<const uint32_t*>(&item); }

// Stages of keys, and of values, in the order of use. An item that follows another begins where that one ended and goes
// back through the stages, in which it finds the last tiles of that one as its first.
template <int Stages>
struct Ring {
  static_assert((Stages & (Stages - 1)) == 0);
  int stage = 0, direction = 1;
  uint32_t parities = ~0u;  // of the tiles that the stages hold, a bit each

  __device__ void begin(bool follows) {
    if (!follows) return;
    direction = -direction;
    stage -= direction;
  }
  // To the stage of the item's next tile.
  __device__ void advance(bool fresh) {
    stage = (stage + direction) & (Stages - 1);
    parities ^= static_cast<uint32_t>(fresh) << stage;
  }
  __device__ uint32_t parity() const { return parities >> stage & 1; }
  // Tile number `step` of an item is there already, or is left for the next one.
  __device__ static bool fresh(bool follows, int step) { return !follows || step >= Stages; }
  __device__ static bool keeps(bool followed, int step, int tiles) { return followed && step >= tiles - Stages; }
};

// What a warp that brings keeps in shared memory: such warps have few registers.
struct Place {
  Item item[2];               // this one, and the next
  int next;                   // first chunk row of the next sequence
  int length;                 // new tokens of this one
  int row0_of_sequence;       // its first chunk row
  int chunks;                 // chunk rows in use
  int into_chunk, into_ring;  // position of the first new token, modulo C and W
  int in_ring;                // tokens before it that the ring may hold
  int sequence;
  uint32_t token0;
  int64_t first;                    // position of the first new token
  int kv_head, snapshot, row_tile;  // of the next item
  unsigned left;                    // items of the claim from there on
  unsigned claims;
  int chunks_begun;
};

enum NamedBarrier { kTheta = 1, kThetas = 3, kClaim = 4 };  // kTheta is the first of two, one for each warpgroup

template <class T, int D, int Streams>
struct Shared {
  static constexpr int kStages = stages(D), kRows = item_rows(Streams);
  // Angles of a head, a stride that puts neighbouring heads in different banks.
  static constexpr int kThetaStride = D / 2 + 8;
  alignas(1024) T q[kQuerySets][kRows * D];
  alignas(1024) T k[kStages][kKeys * D];
  alignas(1024) T v[kStages][kKeys * D];
  // Of all heads; or, if there are more than that, for each warpgroup that attends of the heads of a group, or of its own rows
  // where those are fewer.
  alignas(16) Angle<float> theta[Streams == 2 ? kRows * kThetaStride : 2];
  alignas(16) Angle<float> bank_angles[kItems][D / 2];  // of the turn of queries towards the bank
  alignas(16) float bias[kStages][kKeys];  // of the bank's slots, as a share of the logit before its scale
  alignas(16) float norm_weight[D];
  Item item[kItems];
  Place place[kBringers];
  unsigned claim[2];
  uint64_t q_full[kQuerySets], q_empty[kQuerySets];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Blocks claim work as they come to need it: all row tiles of a chunk and KV head, which have their keys in common, and
// the last chunks one row tile at a time, so that all blocks end together. Chunks come from the last one on: a sequence's first
// ones see fewer keys. The first claims are given, and the counter is there by then.
constexpr unsigned kGiven = 2;
__device__ inline unsigned next_claim(const Arguments& p, unsigned n, unsigned (&slots)[2]) {
  if (n < kGiven) return blockIdx.x + n * gridDim.x;
  if (threadIdx.x == 0) {
    wait_for_stream();
    slots[n % 2] = kGiven * gridDim.x + atomicAdd(p.claims, 1);
  }
  hopper::sync_threads(kClaim, kBringers * kWarp);
  return slots[n % 2];
}
// To the next item of the block, by one warp; false after the last.
__device__ inline bool find_item(const Arguments& p, Place& at, unsigned (&slots)[2], int item_rows, Item& item,
                                 const Item& before, bool follows) {
  const auto tiles_of = [&](int first_row) {
    return (item.seen + p.split(min(first_row + item_rows, item.rows) - 1).token + kKeys) / kKeys;
  };
  while (true) {
    if (at.left == 0) {
      const unsigned n = at.claims, claim = next_claim(p, n, slots);
      if (claim >= p.shares) {
        // Nothing is left to begin. Who starts behind takes all before this kernel for complete, so that is waited for first.
        wait_for_stream();
        let_next_start();
        return false;
      }
      const bool whole = claim < p.whole;
      const unsigned unit = whole ? claim : p.whole + (claim - p.whole) / p.row_tiles, row = unit / p.kv_heads;
      __syncwarp();
      at.claims = n + 1;
      at.left = whole ? p.row_tiles : 1;
      at.row_tile = whole ? 0 : static_cast<int>((claim - p.whole) % p.row_tiles);
      at.snapshot = static_cast<int>(p.chunk_rows) - 1 - static_cast<int>(row);
      at.kv_head = static_cast<int>(unit - row * p.kv_heads);
      __syncwarp();
    }
    const int row_tile = at.row_tile, snapshot = at.snapshot, kv_head = at.kv_head;
    const unsigned left = at.left - 1;
    __syncwarp();
    at.left = left;
    at.row_tile = row_tile + 1;
    const auto skip = [&] {
      __syncwarp();
      at.left = 0;
      __syncwarp();
    };
    if (follows) {
      if (lane_id() < kItemWords) words_of(item)[lane_id()] = words_of(before)[lane_id()];
      __syncwarp();
      const int row0 = row_tile * item_rows;
      item.row0 = row0;
      const bool followed = left > 0 && row0 + item_rows < item.rows && tiles_of(row0 + item_rows) == item.window_tiles;
      item.flags = (before.flags & Item::kCopied) | Item::kFollows | (row_tile % 2 ? Item::kBackwards : 0) |
                   (followed ? Item::kFollowed : 0);
      __syncwarp();
      return true;
    }
    if (snapshot >= at.next || snapshot < at.row0_of_sequence) {
      // As Span counts them, with few divisions: the block's first item waits for this.
      const auto row0 = [&](int token0, int n) { return p.by_chunk.quotient(token0) + 2 * n; };
      const int n = find_sequence_together(p.sequences, snapshot,
                                           [&](int m) { return row0(static_cast<int>(p.cu_seqlens[m]), m); });
      const int token0 = static_cast<int>(p.cu_seqlens[n]), end = static_cast<int>(p.cu_seqlens[n + 1]);
      const int64_t first = p.tokens_seen[n];
      const int into_chunk = static_cast<int>(first - p.by_chunk.quotient(first) * p.chunk);
      __syncwarp();
      at.sequence = n;
      at.token0 = static_cast<uint32_t>(token0);
      at.length = end - token0;
      at.row0_of_sequence = row0(token0, n);
      at.chunks = end > token0 ? p.by_chunk.quotient(into_chunk + end - token0 - 1) + 1 : 0;
      at.next = n + 1 < p.sequences ? row0(end, n + 1) : static_cast<int>(p.chunk_rows);
      at.into_chunk = into_chunk;
      at.into_ring = static_cast<int>(first - p.by_window.quotient(first) * p.window);
      at.first = first;
      at.in_ring = static_cast<int>(min(first, static_cast<int64_t>(p.window)));
      __syncwarp();
    }
    const int chunk = snapshot - at.row0_of_sequence, row0 = row_tile * item_rows;
    if (chunk >= at.chunks) {
      skip();
      continue;
    }
    const int start = chunk * p.chunk - at.into_chunk, token = max(start, 0);
    item.chunk_end = min(start + p.chunk, at.length);
    item.rows = (item.chunk_end - token) * p.group;
    if (row0 >= item.rows) {
      skip();
      continue;
    }
    item.position = at.first + start;
    item.sequence = at.sequence;
    item.snapshot = snapshot;
    item.kv_head = kv_head;
    item.row0 = row0;
    item.token0 = at.token0;
    item.line0 = (at.token0 + token) * p.heads + kv_head * p.group;
    item.first_token = static_cast<int>(at.token0) + token;
    item.chunk_slot = at.chunks_begun % kItems;
    const int begun = at.chunks_begun + 1;
    __syncwarp();
    at.chunks_begun = begun;
    item.window_begin = max(start - (p.window - p.chunk), -at.in_ring);
    const int slot = at.into_ring + item.window_begin;
    item.ring_begin = slot < 0 ? slot + p.window : slot;
    item.seen = token - item.window_begin;
    item.keys = item.chunk_end - item.window_begin;
    item.window_tiles = tiles_of(row0);
    const bool copied = item.window_begin < 0 || item.window_begin + item.window_tiles * kKeys > item.chunk_end;
    // As long as nothing has left the ring the banks are empty.
    const bool empty = item.position <= p.window - p.chunk;
    item.tiles = item.window_tiles + (empty ? 0 : (p.exact_slots + p.summary_slots + kKeys - 1) / kKeys);
    const bool followed = left > 0 && row0 + item_rows < item.rows && tiles_of(row0 + item_rows) == item.window_tiles;
    item.flags =
        (row_tile % 2 ? Item::kBackwards : 0) | (followed ? Item::kFollowed : 0) | (copied ? Item::kCopied : 0);
    __syncwarp();
    return true;
  }
}

}  // namespace coda::kernels::sm90::bounded
