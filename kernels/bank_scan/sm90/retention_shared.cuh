#pragma once

#include "../retention_segments.cuh"
#include "cluster.cuh"

// What the blocks of a cluster share in the retention scan of few tokens (retention_clusters.cu).
namespace coda::kernels::sm90::retention {

constexpr int kThreads = 576, kWarps = kThreads / kWarp;
constexpr int kBlocks = kClusterBlocks;
constexpr int kLists = kBlocks / 2, kHalf = kWarp / 2;  // two lanes share an entry: half of the blocks each
constexpr int kAtOnce = kThreads / 2;                   // entries

// Where another block finds what is in a slot: by the chunk and number of the arrival, or by the slot of the carried bank.
struct Held {
  int source;
  int16_t code, until;
};
struct CarriedEntry {
  uint64_t key;
  int64_t order;  // decides between equal keys
};

// Shared memory of a block. Other blocks write what is marked by a star, at the same places of their own, and it is there once
// the barrier of that name is complete. Keys of 64 bits travel behind: nearly always 32 of them decide.
struct Memory {
  uint64_t *codes, *sets, *keys, *stays;  // barriers
  uint32_t* code;                         // * codes (kBlocks, stride) each block's tokens in descending order, zeros behind them
  uint32_t* carried_code;                 // * codes (2, carried_stride) the carried bank likewise, in two halves
  int2* come;     // * sets (kBlocks, most_chunks, words) of 32 places each: which the chunks up to this one bring, and how
                  //   many in the words before
  uint64_t* key;  // * keys (kBlocks, most_tokens)
  uint64_t* carried_key;  // * keys (capacity)
  int* link;              // * stays (kBlocks, most_tokens) whose slot arrival k of chunk b takes, at b C + k: so written if that
                          //   is an arrival too, or -1 - slot
  Held* held;             // * stays (capacity) the bank before the block's first chunk, by rank
  Held* last;             // * stays (share) that after the last chunk, from rank `share` times the block's number on
  int* arrived;           // * stays (kBlocks)
  CarriedEntry* entry;    // (capacity) by slot
  int* at_first;          // (exact_slots) sources of what the slots hold at first
  CarriedEntry* mine;     // (share) the block's part of `entry`, with ranks for orders
  uint32_t *raw_code, *run_code;  // (most_tokens) as they come, and in order within each 32
  uint64_t *raw_key, *run_key;
  int *run_token, *token;  // (most_tokens)
  short4* rank;            // (entries, 2) after each block's last chunk
  short2* stay;            // (entries) the first chunk that finds it gone, -1 for tokens that never come in, and its last rank
  int16_t* number;         // (most_tokens) by place: of the arrival
  unsigned* arrives;       // (words) bits by position
  int32_t* strip;          // (most_chunks, exact_slots)
  double* inv_freq;        // (D/2)
};

struct RetentionClusters : RetentionScan {
  int most_chunks, most_tokens;  // of a block, the tokens with what fills up the last 32
  int stride, words, carried_stride;
  int share;  // slots of a block, sinks among them
  int ring;   // blocks that copy the ring
  Divisor by_slots;
  Memory memory;  // offsets
  size_t shared;

  explicit RetentionClusters(const BankScanForward& params) : RetentionScan(params), by_slots(params.exact_slots) {
    const auto next_power = [](int x) {
      int power = 1;
      while (power <= x) power *= 2;
      return power;
    };
    most_chunks = static_cast<int>(std::max<int64_t>(((tokens + chunk - 1) / chunk + kBlocks - 1) / kBlocks, 1));
    most_tokens = (most_chunks * chunk + kWarp - 1) / kWarp * kWarp;
    stride = next_power(most_tokens) + 4;  // the two lanes of an entry look at different banks
    words = (most_tokens / kWarp + 1) / 2 * 2;
    carried_stride = next_power((capacity + 1) / 2) + 4;
    share = (exact_slots + kBlocks - 1) / kBlocks;
    ring = static_cast<int>(ring_parts(*this, kWarps, copied));
    const int entries = most_tokens + share;
    Carver carver(nullptr);
    memory.codes = carver.take<uint64_t>(1);
    memory.sets = carver.take<uint64_t>(1);
    memory.keys = carver.take<uint64_t>(1);
    memory.stays = carver.take<uint64_t>(1);
    memory.code = carver.take<uint32_t>(kBlocks * stride);
    memory.carried_code = carver.take<uint32_t>(2 * carried_stride);
    memory.come = carver.take<int2>(kBlocks * most_chunks * words);
    memory.key = carver.take<uint64_t>(kBlocks * most_tokens);
    memory.carried_key = carver.take<uint64_t>(capacity);
    memory.link = carver.take<int>(kBlocks * most_tokens);
    memory.held = carver.take<Held>(capacity);
    memory.last = carver.take<Held>(share);
    memory.arrived = carver.take<int>(kBlocks);
    memory.entry = carver.take<CarriedEntry>(capacity);
    memory.at_first = carver.take<int>(exact_slots);
    memory.mine = carver.take<CarriedEntry>(share);
    memory.raw_code = carver.take<uint32_t>(most_tokens);
    memory.run_code = carver.take<uint32_t>(most_tokens);
    memory.raw_key = carver.take<uint64_t>(most_tokens);
    memory.run_key = carver.take<uint64_t>(most_tokens);
    memory.run_token = carver.take<int>(most_tokens);
    memory.token = carver.take<int>(most_tokens);
    memory.rank = carver.take<short4>(entries * 2);
    memory.stay = carver.take<short2>(entries);
    memory.number = carver.take<int16_t>(most_tokens);
    memory.arrives = carver.take<unsigned>(words + 1);
    memory.strip = carver.take<int32_t>(most_chunks * exact_slots);
    memory.inv_freq = carver.take<double>(dim / 2);
    shared = carver.used();
  }
};

// The leading 32 bits' worth of a key, in the same order but for equal ones.
__device__ inline uint32_t code_of(double key) {
  const uint32_t bits = __float_as_uint(__double2float_rd(add_rn(key, 0.0)));
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

// As count_above, for where codes do not decide: seldom, so once in code.
__device__ __noinline__ int count_exactly(const uint64_t* list, int count, uint64_t key) { return count_above(list, count, key); }

// Below those of all keys: free slots, then tokens that are not offered and what fills up the last 32, each for itself.
constexpr uint32_t kFreeCode = 1 << 20, kNotOfferedCode = kWarp;

constexpr int kAsBefore = -2;  // in a strip: what the row before has

}  // namespace coda::kernels::sm90::retention
