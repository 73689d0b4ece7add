#include "../retention_segments.cuh"
#include "cluster.cuh"
#include "steps.h"

// The retention scan of few tokens in one launch: a cluster for each sequence and gate group, whose blocks share the chunks in which
// something leaves the ring (README.md). Identities are those of retention_segments.cuh; chunks are counted from the first of those.
namespace coda::kernels::sm90 {
#ifdef SCAN_DEV
int dev_mode = 0;
#endif
namespace {

using namespace hopper;

constexpr int kThreads = 576, kWarps = kThreads / kWarp, kBeginThreads = 512;
constexpr int kBlocks = kClusterBlocks;
constexpr int kLists = kBlocks / 2, kHalf = kWarp / 2;  // two lanes share an entry: half of the blocks each
constexpr int kAtOnce = kThreads / 2;                   // entries
constexpr int64_t kMostTokens = 4096;
constexpr int kMostSteps = 1024;  // of the searches in lists and halves of a bank
constexpr int kCountBits = 24;  // of a sequence's arrivals; above them, how many groups have counted

// Where another block finds what is in a slot: by the chunk and number of the arrival, or by the slot of the carried bank.
struct Held {
  int source;
  int16_t code, until;
};
struct CarriedEntry {
  uint64_t key;
  int64_t order;  // decides between equal keys
};

// Shared memory of a block. Other blocks write what is marked by a star, at the same places of their own, and it is there once the
// barrier of that name is complete. Keys of 64 bits travel behind: nearly always 32 of them decide.
struct Memory {
  uint64_t *codes, *sets, *keys, *stays;  // barriers
  uint32_t* code;          // * codes (kBlocks, stride) each block's tokens in descending order, zeros behind them
  uint32_t* carried_code;  // * codes (2, carried_stride) the carried bank likewise, in two halves
  int2* come;              // * sets (kBlocks, most_chunks, words) of 32 places each: which the chunks up to this one bring, and how
                           //   many in the words before
  uint64_t* key;           // * keys (kBlocks, most_tokens)
  int* link;               // * stays (kBlocks, most_tokens) whose slot arrival k of chunk b takes, at b C + k: so written if that
                           //   is an arrival too, or -1 - slot
  Held* held;              // * stays (capacity) the bank before the block's first chunk, by rank
  Held* last;              // * stays (share) that after the last chunk, from rank `share` times the block's number on
  int* arrived;            // * stays (kBlocks)
  CarriedEntry* entry;     // (capacity) by slot
  int* at_first;           // (exact_slots) sources of what the slots hold at first
  CarriedEntry* mine;      // (share) the block's part of `entry`, with ranks for orders
  uint32_t *raw_code, *run_code;  // (most_tokens) as they come, and in order within each 32
  uint64_t *raw_key, *run_key;
  int *run_token, *token;  // (most_tokens)
  short4* rank;            // (entries, 2) after each block's last chunk
  short2* stay;            // (entries) the first chunk that finds it gone, -1 for tokens that never come in, and its last rank
  int16_t* number;         // (most_tokens) by place: of the arrival
  unsigned* arrives;       // (words) bits by position
  int32_t* strip;          // (most_chunks, exact_slots)
};

struct RetentionClusters : RetentionScan {
  int most_chunks, most_tokens;  // of a block, the tokens with what fills up the last 32
  int stride, words, carried_stride;
  int share;  // slots of a block, sinks among them
  int ring_parts;  // blocks that copy the ring and the sinks of a KV head
  int gate_bytes;
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
    ring_parts = (window + num_sinks + kWarps - 1) / kWarps;
    gate_bytes = 0;
    const int entries = most_tokens + share;
    Carver carver(nullptr);
    memory.codes = carver.take<uint64_t>(1);
    memory.sets = carver.take<uint64_t>(1);
    memory.keys = carver.take<uint64_t>(1);
    memory.stays = carver.take<uint64_t>(1);
    memory.code = carver.take<uint32_t>(kBlocks * stride);
    memory.carried_code = carver.take<uint32_t>(2 * carried_stride);
    memory.arrives = carver.take<unsigned>(words + 1);
    memory.come = carver.take<int2>(kBlocks * most_chunks * words);
    memory.key = carver.take<uint64_t>(kBlocks * most_tokens);
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
    memory.strip = carver.take<int32_t>(most_chunks * exact_slots);
    shared = carver.used();
  }
};

__device__ inline uint32_t load_word(uint32_t shared) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(shared));
  return word;
}

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

template <class T>
struct GroupScan {
  using A = acc_t<T>;
  const RetentionClusters& p;
  unsigned char* shared;
  const SequencePlan& sequence;
  int group, block;
  int lead, evicting;          // chunk rows before the first chunk that evicts, and those from there on
  int chunks, tokens, padded;  // of a block, as in RetentionClusters
  int top;                     // the power of two above
  int begin, used;             // of this one

  __device__ GroupScan(const RetentionClusters& params, unsigned char* memory, const SequencePlan& plan, int g)
      : p(params), shared(memory), sequence(plan), group(g), block(cluster_rank()) {
    lead = p.by_chunk.quotient(-sequence.first_id);
    evicting = max(sequence.chunks - lead, 0);
    chunks = max((evicting + kBlocks - 1) / kBlocks, 1);
    tokens = chunks * p.chunk;
    padded = (tokens + kWarp - 1) / kWarp * kWarp;
    top = 1 << (32 - __clz(padded));
    begin = block * chunks;
    used = min(max(evicting - begin, 0), chunks);
  }

  template <class X>
  __device__ X* at(X* Memory::* array) const {
    return reinterpret_cast<X*>(shared + reinterpret_cast<size_t>(p.memory.*array));
  }
  __device__ int64_t state() const { return sequence.state_row(p, group); }
  __device__ int64_t position(int c) const { return sequence.evicted + begin * p.chunk + c; }
  __device__ bool offered(int c) const { return c < used * p.chunk && position(c) >= p.num_sinks; }
  __device__ A logit(int c) const {
    const int fresh = static_cast<int>(position(c) - sequence.first);
    const A* from = fresh < 0 ? static_cast<const A*>(p.state_gate) + state() * (p.window + p.exact_slots) +
                                    sequence.source_of(p, position(c))
                              : static_cast<const A*>(p.gate) + static_cast<int64_t>(sequence.token0 + fresh) * p.gate_groups + group;
    return *from;
  }
  __device__ int2* come(int owner, int b) const { return at(&Memory::come) + (owner * p.most_chunks + b) * p.words; }
  // Arrivals of the chunk of token c before it.
  __device__ int number_of(int c, int from) const {
    const unsigned* arrives = at(&Memory::arrives);
    int count = 0;
#pragma unroll 1
    for (int w = from / kWarp; w <= c / kWarp; ++w) {
      unsigned bits = arrives[w];
      if (w == from / kWarp) bits &= kAllLanes << from % kWarp;
      if (w == c / kWarp) bits &= (1u << c % kWarp) - 1;
      count += __popc(bits);
    }
    return count;
  }
  __device__ int slot_of(int code) const {
    const int* link = at(&Memory::link);
    while (code >= 0) code = link[code];
    return -1 - code;
  }
  __device__ const T* row_of(const void* state_rows, const void* fresh_rows, int source, int head) const {
    const int held = p.window + p.exact_slots;
    return source < held ? static_cast<const T*>(state_rows) +
                               ((static_cast<int64_t>(sequence.number) * p.kv_heads + head) * held + source) * p.dim
                         : static_cast<const T*>(fresh_rows) +
                               (static_cast<int64_t>(sequence.token0 + source - held) * p.kv_heads + head) * p.dim;
  }
  __device__ int carried() const { return min(max(p.capacity - block * p.share, 0), p.share); }  // entries of the block

  // The ranks of the block's share of the carried bank, a warp for each. Its keys go to all blocks.
  __device__ void rank_carried() const {
    const CarriedEntry* entry = at(&Memory::entry);
#pragma unroll 1
    for (int i = warp_id(); i < carried(); i += kWarps) {
      const CarriedEntry mine = entry[block * p.share + i];
      int rank = 0;
#pragma unroll 4
      for (int o = lane_id(); o < p.capacity; o += kWarp) {
        const CarriedEntry other = entry[o];
        rank += (other.key > mine.key) | ((other.key == mine.key) & (other.order > mine.order));
      }
      rank = __reduce_add_sync(kAllLanes, rank);
      const int half = rank >= (p.capacity + 1) / 2, to = lane_id() % kBlocks;
      uint32_t* code = at(&Memory::carried_code) + half * (p.carried_stride - (p.capacity + 1) / 2) + rank;
      const uint32_t mine_code = mine.key == kFreeSlot ? kFreeCode : code_of(key_of(mine.key));
      if (lane_id() >= kBlocks) continue;
      if (to != block) {
        send(remote_address(code, to), mine_code, remote_address(at(&Memory::codes), to));
      } else {
        *code = mine_code;
        at(&Memory::mine)[i] = {mine.key, rank};
      }
    }
  }
  // The same of a bank that holds nothing, by each block for itself.
  __device__ void rank_free() const {
    const int first = (p.capacity + 1) / 2;
#pragma unroll 1
    for (int rank = threadIdx.x; rank < p.capacity; rank += kThreads) {
      at(&Memory::carried_code)[rank < first ? rank : p.carried_stride + rank - first] = kFreeCode;
      if (rank < carried()) at(&Memory::mine)[rank] = {kFreeSlot, p.capacity - 1 - (block * p.share + rank)};
    }
  }
  __device__ static double key_of(uint64_t ordered) {
    return __longlong_as_double(static_cast<long long>(ordered >> 63 ? ordered & ~(uint64_t(1) << 63) : ~ordered));
  }

  // Sorts the block's tokens: each 32, then all. Between equal keys the later token comes first. The whole block; begins and ends
  // with a barrier.
  __device__ void sort() const {
    const uint32_t *raw_code = at(&Memory::raw_code), *run_code = at(&Memory::run_code);
    const uint64_t *raw_key = at(&Memory::raw_key), *run_key = at(&Memory::run_key);
    __syncthreads();
#pragma unroll 1
    for (int base = 0; base < padded; base += kAtOnce) {
      const int c = base + static_cast<int>(threadIdx.x) / 2, half = threadIdx.x % 2, first = c / kWarp * kWarp;
      if (first >= padded) break;  // the whole warp
      const uint32_t mine = raw_code[c];
      const auto* quads = reinterpret_cast<const uint4*>(raw_code + first) + half;
      int rank = 0, equal = 0;
#pragma unroll
      for (int i = 0; i < kWarp / 8; ++i) {
        const uint4 quad = quads[2 * i];
        rank += (quad.x > mine) + (quad.y > mine) + (quad.z > mine) + (quad.w > mine);
        equal += (quad.x == mine) + (quad.y == mine) + (quad.z == mine) + (quad.w == mine);
      }
      rank += __shfl_xor_sync(kAllLanes, rank, 1);
      equal += __shfl_xor_sync(kAllLanes, equal, 1);
      if (half != 0) continue;
      const uint64_t key = raw_key[c];
      if (equal > 1) {
#pragma unroll 1
        for (int i = first; i < first + kWarp; ++i) {
          rank += raw_code[i] == mine && (raw_key[i] > key || (raw_key[i] == key && i > c));
        }
      }
      at(&Memory::run_code)[first + rank] = mine;
      at(&Memory::run_key)[first + rank] = key;
      at(&Memory::run_token)[first + rank] = c;
    }
    __syncthreads();
    const int runs = padded / kWarp;
#pragma unroll 1
    for (int base = 0; base < padded; base += kAtOnce) {
      const int i = base + warp_id() * kHalf + lane_id() % kHalf, half = lane_id() / kHalf;
      if (base + warp_id() * kHalf >= padded) break;
      const uint32_t mine = run_code[i];
      const uint64_t key = run_key[i];
      int rank = half == 0 ? i % kWarp : 0;
#pragma unroll 1
      for (int r = 0; r < runs; r += kBlocks) {
        const uint32_t* from[kLists];
#pragma unroll
        for (int l = 0; l < kLists; ++l) from[l] = run_code + min(r + half * kLists + l, runs - 1) * kWarp;
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
          for (int l = 0; l < kLists; ++l) {
            if (from[l][step - 1] > mine) from[l] += step;
          }
        }
#pragma unroll
        for (int l = 0; l < kLists; ++l) {
          const int run = r + half * kLists + l;
          const uint32_t next = *from[l];
          int above = static_cast<int>(from[l] - run_code) - run * kWarp + (next > mine);
          if (run >= runs || run == i / kWarp) {
            above = 0;
          } else if (next == mine) {
            above = count_exactly(run_key + run * kWarp, kWarp, key - (run > i / kWarp));
          }
          rank += above;
        }
      }
      rank += __shfl_xor_sync(kAllLanes, rank, kHalf);
      if (half != 0) continue;
      at(&Memory::code)[block * p.stride + rank] = mine;
      at(&Memory::key)[block * p.most_tokens + rank] = key;
      at(&Memory::token)[rank] = at(&Memory::run_token)[i];
    }
    __syncthreads();
  }

  // Sends what is at `from`, 16 bytes at a time, to the same place of all other blocks: a warp for each, from `warp` on.
  template <class X>
  __device__ void send_all(const X* from, int packets, uint64_t* barrier, int warp) const {
    int other = warp_id() - warp + 1;
    if (other < 1) other += kWarps;
    if (other >= kBlocks) return;
    const int to = (block + other) % kBlocks;
    const auto* packet = reinterpret_cast<const uint4*>(from);
    const uint32_t there = remote_address(packet, to), arrived = remote_address(barrier, to);
#pragma unroll 2
    for (int i = lane_id(); i < packets; i += kWarp) send(there + i * sizeof(uint4), packet[i], arrived);
  }
  // The sets of what has come up to each chunk, a warp for each, in this block's memory and in that of all others.
  __device__ void send_sets() const {
    const int* token = at(&Memory::token);
#pragma unroll 1
    for (int b = warp_id(); b < chunks; b += kWarps) {
      const int end = (b + 1) * p.chunk;
      int before = 0;
#pragma unroll 1
      for (int w0 = 0; w0 < padded / kWarp; w0 += 2 * kLists) {
        const int pair = lane_id() % kLists;  // of words, and the block that this lane sends them to
        int4 two{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 2 * kLists; ++i) {
          const int place = (w0 + i) * kWarp + lane_id();
          const int member = static_cast<int>(__ballot_sync(kAllLanes, place < padded && token[min(place, padded - 1)] < end));
          if (pair == i / 2) (i % 2 == 0 ? two.x : two.z) = member, (i % 2 == 0 ? two.y : two.w) = before;
          before += __popc(member);
        }
        const int to = lane_id() / kLists;
        int2* words = come(block, b) + w0 + 2 * pair;
        if (w0 + 2 * pair >= p.words || w0 + 2 * pair >= padded / kWarp) continue;
        if (to == block) {
          *reinterpret_cast<int4*>(words) = two;
        } else {
          send(remote_address(words, to), *reinterpret_cast<const uint4*>(&two), remote_address(at(&Memory::sets), to));
        }
      }
    }
  }

  // A code below which no token of the block comes in: of k lists before its own, each has the capacity's k-th part of better ones;
  // and so has the carried bank. One warp.
  __device__ uint32_t least_entering() const {
    if (p.capacity == 0) return kAllLanes;
    const int half = (p.capacity + 1) / 2;
    const uint32_t carried = at(&Memory::carried_code)[p.capacity > 1 ? p.carried_stride + p.capacity / 2 - 1 : half - 1];
    const int of_each = block > 0 ? (p.capacity + block - 1) / block : padded + 1;
    if (of_each > padded) return carried;
    const uint32_t mine = lane_id() < block ? at(&Memory::code)[lane_id() * p.stride + of_each - 1] : kAllLanes;
    return max(carried, __reduce_min_sync(kAllLanes, mine));
  }

  // How many of a list's keys are above `least`, where that many codes are greater and the next is equal.
  __device__ int resolve(const uint64_t* keys, int greater, bool several, uint64_t least) const {
    wait(at(&Memory::keys), 0);
    return several ? count_exactly(keys, padded, least) : greater + (keys[greater] > least);
  }

  // Finds when each of the block's tokens and of its share of the carried bank leaves.
  __device__ void find_stays() const {
    const uint32_t *code = at(&Memory::code), *carried_code = at(&Memory::carried_code);
    const int entries = tokens + carried(), half = lane_id() / kHalf;
    const int carried_top = p.carried_stride - 4;
    const uint32_t least_code = least_entering();
#pragma unroll 1
    for (int base = 0; base + warp_id() * kHalf < entries; base += kAtOnce) {
      const int e = base + warp_id() * kHalf + lane_id() % kHalf, i = e - tokens;
      const bool is_token = i < 0, valid = e < entries;
      const int own = is_token ? block : -1;
      if (base + (warp_id() + 1) * kHalf <= tokens && code[block * p.stride + base + warp_id() * kHalf] < least_code) {
        if (half == 0) at(&Memory::stay)[e] = {-1, 0};
        continue;
      }
      const uint64_t key = is_token ? at(&Memory::key)[block * p.most_tokens + e] : valid ? at(&Memory::mine)[i].key : 0;
      const uint32_t mine = is_token ? code[block * p.stride + e] : key == kFreeSlot ? kFreeCode : valid ? code_of(key_of(key)) : kAllLanes;
      uint32_t from[kLists], better = shared_address(carried_code + half * p.carried_stride);
#pragma unroll
      for (int l = 0; l < kLists; ++l) from[l] = shared_address(code + (half * kLists + l) * p.stride);
#pragma unroll
      for (int step = kMostSteps; step > 0; step /= 2) {  // offsets that the code holds
        if (step < top) {
          uint32_t at_step[kLists];
#pragma unroll
          for (int l = 0; l < kLists; ++l) at_step[l] = load_word(from[l] + (step - 1) * 4);
#pragma unroll
          for (int l = 0; l < kLists; ++l) from[l] += at_step[l] > mine ? step * 4 : 0;
        }
        if (step < carried_top) better += load_word(better + (step - 1) * 4) > mine ? step * 4 : 0;
      }
      // Between equal keys the later token is the better one.
      int above[kLists];
      uint32_t next[kLists];
#pragma unroll
      for (int l = 0; l < kLists; ++l) next[l] = load_word(from[l]);
      const bool tie = is_token && key > kFreeSlot && load_word(better) == mine;
#pragma unroll
      for (int l = 0; l < kLists; ++l) {
        const int list = half * kLists + l;
        above[l] = static_cast<int>(from[l] - shared_address(code + list * p.stride)) / 4;
        if (next[l] == mine && list != own && key > kFreeSlot) {
          above[l] = resolve(at(&Memory::key) + list * p.most_tokens, above[l], load_word(from[l] + 4) == mine, key - (list > own));
        }
        if (list == own) above[l] = e;
      }
      int outranked = static_cast<int>(better - shared_address(carried_code + half * p.carried_stride)) / 4;
      if (__shfl_xor_sync(kAllLanes, static_cast<int>(tie), kHalf) | tie) {
        outranked = 0;
#pragma unroll 1
        for (int j = half; j < p.capacity; j += 2) outranked += at(&Memory::entry)[j].key > key;
      }
      // Of the blocks in their order, this half's: the one in whose chunks it leaves, its rank before them, and its place among
      // their tokens.
      int sum = outranked + __shfl_xor_sync(kAllLanes, outranked, kHalf);
      if (!is_token) sum = valid ? static_cast<int>(at(&Memory::mine)[i].order) : p.capacity;
      int all = above[0] + above[1] + above[2] + above[3];
      all = __shfl_xor_sync(kAllLanes, all, kHalf);
      if (half == 1) sum += all;
      int in = -1, before = 0, place = 0, ranks[kLists];
#pragma unroll
      for (int l = 0; l < kLists; ++l) {
        const int s = half * kLists + l;
        if (s >= own && in < 0 && sum + above[l] >= p.capacity) {
          in = s;
          before = sum;
          place = above[l];
        }
        ranks[l] = min(sum += above[l], p.capacity);
      }
      const int other_in = __shfl_xor_sync(kAllLanes, in, kHalf), other_before = __shfl_xor_sync(kAllLanes, before, kHalf),
                other_place = __shfl_xor_sync(kAllLanes, place, kHalf);
      if (half == 0 ? in < 0 : other_in >= 0) {
        in = other_in;
        before = other_before;
        place = other_place;
      }
      // It leaves in the first of that block's chunks in which the bank is full with better ones.
      int low = 0, last = before;
      wait(at(&Memory::sets), 0);
      if (in >= 0) {
        const int bit = max(place - 1, 0);
        const unsigned mask = place > 0 ? kAllLanes >> (kWarp - 1 - bit % kWarp) : 0;
        const int2* word = come(in, half) + bit / kWarp;
#pragma unroll 2
        for (int b = half; b < chunks; b += 2, word += 2 * p.words) {
          const int2 two = *word;
          const int rank = before + (place > 0 ? two.y : 0) + __popc(two.x & mask);
          low += rank < p.capacity;
          last = rank < p.capacity ? max(last, rank) : last;
        }
      }
      low += __shfl_xor_sync(kAllLanes, low, kHalf);
      last = max(last, __shfl_xor_sync(kAllLanes, last, kHalf));
      if (!valid) continue;
      const int c = is_token ? at(&Memory::token)[e] : 0, born = p.by_chunk.quotient(c);
      const bool enters = !is_token || (in != own || (low > born && before < p.capacity));
      if (half == 0) {
        at(&Memory::stay)[e] = {static_cast<short>(!enters ? -1 : in < 0 ? evicting : in * chunks + low), static_cast<short>(last)};
        if (is_token && enters) atomicOr(at(&Memory::arrives) + c / kWarp, 1u << c % kWarp);
      }
      at(&Memory::rank)[2 * e + half] = make_short4(static_cast<short>(ranks[0]), static_cast<short>(ranks[1]),
                                                    static_cast<short>(ranks[2]), static_cast<short>(ranks[3]));
    }
  }

  // Sends what the blocks need to know of the entries: whose slot each arrival takes, and which they find in the bank.
  __device__ void send_stays() const {
    const int entries = tokens + carried(), half = lane_id() / kHalf;
    uint64_t* barrier = at(&Memory::stays);
    int links = 0;
#pragma unroll 1
    for (int base = 0; base + warp_id() * kHalf < entries; base += kAtOnce) {
      const int e = base + warp_id() * kHalf + lane_id() % kHalf, i = e - tokens;
      const short2 stay = e < entries ? at(&Memory::stay)[e] : short2{-1, 0};
      const bool leaves = stay.x >= 0 && stay.x < evicting;
      links += __popc(__ballot_sync(kAllLanes, leaves && half == 0));
      if (stay.x < 0) continue;
      int code, source;
      if (i < 0) {
        const int c = at(&Memory::token)[e], from = p.by_chunk.quotient(c) * p.chunk;
        code = begin * p.chunk + from + number_of(c, from);
        source = sequence.source_of(p, position(c));
        if (half == 0) at(&Memory::number)[e] = static_cast<int16_t>(code);
      } else {
        code = -1 - (block * p.share + i);
        source = at(&Memory::at_first)[p.num_sinks + block * p.share + i];
      }
      const uint32_t rest = static_cast<uint16_t>(code) | static_cast<uint32_t>(stay.x) << 16;
      const int link = stay.x * p.chunk + p.capacity - 1 - stay.y;
      const int first = i < 0 ? block + 1 : 0;  // block that finds it in the bank
      const auto* ranks = reinterpret_cast<const short*>(at(&Memory::rank) + 2 * e);
#pragma unroll
      for (int l = 0; l < kLists; ++l) {
        const int to = half * kLists + l;
        const uint32_t there = remote_address(barrier, to);
        if (leaves) send(remote_address(at(&Memory::link) + link, to), static_cast<uint32_t>(code), there);
        if (to < first) continue;
        const int rank = to > 0 ? ranks[to - 1] : static_cast<int>(at(&Memory::mine)[i].order);
        if (rank < p.capacity) send(remote_address(at(&Memory::held) + rank, to), static_cast<uint32_t>(source), rest, there);
      }
      if (half == 0 && !leaves) {
        const int rank = ranks[kBlocks - 1], to = rank / p.share;
        send(remote_address(at(&Memory::last) + rank - to * p.share, to), static_cast<uint32_t>(source), rest,
             remote_address(barrier, to));
      }
      if (!leaves && source >= 0) {  // who copies it will find it near
        const T* row = row_of(half == 0 ? p.state_k : p.state_v, half == 0 ? p.k : p.v, source, group);
#pragma unroll 1
        for (int d = 0; d < p.dim; d += 128 / static_cast<int>(sizeof(T))) fetch_line(row + d);
      }
    }
    if (lane_id() < kBlocks) {
      arrive_expect_remote(remote_address(barrier, lane_id()), links * static_cast<int>(sizeof(int)));
    }
  }

  // Rows of the index before anything leaves the ring, and those that no chunk uses.
  __device__ void write_idle_rows() const {
    const int next = sequence.number + 1;
    const int rows = (next < p.sequences ? SequencePlan::row_start(p, next) : static_cast<int>(p.chunk_rows)) - sequence.row0;
    const int idle = min(lead, sequence.chunks);
#pragma unroll 1
    for (int i = block; i < idle + rows - sequence.chunks; i += kBlocks) {
      const int row = i < idle ? i : i - idle + sequence.chunks;
#pragma unroll 1
      for (int j = threadIdx.x; j < p.exact_slots; j += kThreads) index_row(row)[j] = i < idle ? at(&Memory::at_first)[j] : -1;
    }
  }
  __device__ int32_t* index_row(int row) const {
    return p.index + (static_cast<int64_t>(sequence.row0 + row) * p.gate_groups + group) * p.exact_slots;
  }
  __device__ int sink_source(int j, int64_t end) const {
    return j >= sequence.evicted && j < end ? sequence.source_of(p, j) : at(&Memory::at_first)[j];
  }
  // What the strip holds beside entries.
  __device__ void write_sinks() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < used * p.num_sinks; i += kThreads) {
      const int b = i / p.num_sinks, j = i - b * p.num_sinks;
      at(&Memory::strip)[b * p.exact_slots + j] = sink_source(j, sequence.evicted + (begin + b + 1) * p.chunk);
    }
  }
  // The rows of the block's chunks.
  __device__ void write_rows() const {
    int32_t* strip = at(&Memory::strip) + p.num_sinks;
#pragma unroll 1
    for (int x = threadIdx.x; x < p.capacity + tokens; x += kThreads) {
      const int e = x - p.capacity;
      if (e < 0) {
        const Held held = at(&Memory::held)[x];
        if (held.until > begin && used > 0) strip[slot_of(held.code)] = held.source;
      } else if (at(&Memory::stay)[e].x >= 0) {
        const int c = at(&Memory::token)[e];
        strip[p.by_chunk.quotient(c) * p.exact_slots + slot_of(at(&Memory::number)[e])] = sequence.source_of(p, position(c));
      }
    }
    __syncthreads();
    strip -= p.num_sinks;
#pragma unroll 1
    for (int j = threadIdx.x; j < p.exact_slots; j += kThreads) {
      int held = -1;
      int32_t* to = index_row(lead + begin) + j;
#pragma unroll 4
      for (int b = 0; b < used; ++b, to += p.gate_groups * p.exact_slots) {
        const int now = strip[b * p.exact_slots + j];
        *to = held = now == kAsBefore ? held : now;
      }
    }
  }
};

// What one slot of one KV head holds in the new state, a token turned back where it comes into the bank. All loads first: find_slot()
// may take its time, where the slot is not that of `from`. Returns it. One warp.
template <class T, class FindSlot>
__device__ inline int copy_slot(const RetentionClusters& p, const SequencePlan& sequence, int head, int from, bool bank,
                                int64_t position, FindSlot find_slot) {
  using A = acc_t<T>;
  constexpr int kPairs = 2;  // of a lane at once
  const int held = p.window + p.exact_slots, dim = p.dim, lane = lane_id();
  const int64_t state_rows = (static_cast<int64_t>(sequence.number) * p.kv_heads + head) * held;
  const int64_t gates = sequence.state_row(p, head) * held, token = sequence.token0 + from - held;
  const bool fresh = from >= held, turned = bank && p.has_bank_distance && (from < p.window || fresh);
  const int64_t row = (fresh ? token * p.kv_heads + head : state_rows + from) * dim;
  const T* key = static_cast<const T*>(fresh ? p.k : p.state_k) + row;
  const T* value = static_cast<const T*>(fresh ? p.v : p.state_v) + row;
  const int packets = p.wide ? dim * static_cast<int>(sizeof(T)) / 16 : 0;
  uint4 packet{};
  if (lane < packets) packet = reinterpret_cast<const uint4*>(value)[lane];
  T first[kPairs], second[kPairs];
  const auto load_pairs = [&](int base) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = min(base + k * kWarp, dim / 2 - 1);
      first[k] = key[first_of_pair(i, p.rope_interleaved)];
      second[k] = key[second_of_pair(i, dim, p.rope_interleaved)];
    }
  };
  load_pairs(lane);
  A logit{};
  if (lane == 0) {
    logit = fresh ? static_cast<const A*>(p.gate)[token * p.gate_groups + head] : static_cast<const A*>(p.state_gate)[gates + from];
  }
  const int slot = find_slot();
  T* new_key = static_cast<T*>(p.new_k) + (state_rows + slot) * dim;
  T* new_value = static_cast<T*>(p.new_v) + (state_rows + slot) * dim;
#pragma unroll 1
  for (int base = lane; base < dim / 2; base += kPairs * kWarp) {
    if (base > lane) load_pairs(base);
    if (turned) {
      Angle<A> by[kPairs];
#pragma unroll
      for (int k = 0; k < kPairs; ++k) by[k] = rope_angle<A>(-position, p.inv_freq[min(base + k * kWarp, dim / 2 - 1)]);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        A a = widen(first[k]), b = widen(second[k]);
        turn_pair(a, b, by[k]);
        first[k] = narrow<T>(a);
        second[k] = narrow<T>(b);
      }
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = base + k * kWarp;
      if (i >= dim / 2) break;
      new_key[first_of_pair(i, p.rope_interleaved)] = first[k];
      new_key[second_of_pair(i, dim, p.rope_interleaved)] = second[k];
    }
  }
  if (lane < packets) reinterpret_cast<uint4*>(new_value)[lane] = packet;
#pragma unroll 1
  for (int i = lane + kWarp; i < packets; i += kWarp) {
    reinterpret_cast<uint4*>(new_value)[i] = reinterpret_cast<const uint4*>(value)[i];
  }
#pragma unroll 1
  for (int i = lane; i < (p.wide ? 0 : dim); i += kWarp) new_value[i] = value[i];
  if (lane == 0) static_cast<A*>(p.new_gate)[gates + slot] = logit;
  return slot;
}

// What no other block writes, before anything is known.
__device__ inline void clear_memory(const RetentionClusters& p, unsigned char* shared) {
  const auto at = [&](auto* offset) { return reinterpret_cast<decltype(offset)>(shared + reinterpret_cast<size_t>(offset)); };
  const int mine = threadIdx.x, first = (p.capacity + 1) / 2;
#pragma unroll 1
  for (int i = mine; i <= p.words; i += kThreads) at(p.memory.arrives)[i] = 0;
#pragma unroll 1
  for (int i = mine; i < p.carried_stride; i += kThreads) {
    if (i >= first) at(p.memory.carried_code)[i] = 0;
    if (i >= p.capacity / 2) at(p.memory.carried_code)[p.carried_stride + i] = 0;
  }
#pragma unroll 1
  for (int i = mine; i < p.most_chunks * p.exact_slots; i += kThreads) at(p.memory.strip)[i] = kAsBefore;
}

// Of one sequence and gate group, all that its cluster does but for the copies.
template <class T>
__device__ inline void scan_group(const GroupScan<T>& scan, int64_t first_position, acc_t<T> first_gate) {
  using A = acc_t<T>;
  const RetentionClusters& p = scan.p;
  const auto& sequence = scan.sequence;
  const int slots = p.exact_slots, sinks = p.num_sinks, mine = threadIdx.x;
  const int64_t* positions = p.exact_pos + scan.state() * slots;
  const A* gates = static_cast<const A*>(p.state_gate) + scan.state() * (p.window + slots) + p.window;
  const A first_logit = mine < scan.tokens && scan.offered(mine) ? scan.logit(mine) : A(0);
  bool holds = false;  // anything beside the sinks
#pragma unroll 1
  for (int j = mine; j < slots; j += kThreads) {
    const int64_t position = j == mine ? first_position : positions[j];
    const A gate = j == mine ? first_gate : gates[j];
    scan.at(&Memory::at_first)[j] = position < 0 ? -1 : p.window + j;
    // Arrivals take the slots of the last ranks: free ones fill in ascending order.
    if (j >= sinks) {
      holds |= position >= 0;
      scan.at(&Memory::entry)[j - sinks] =
          position < 0 ? CarriedEntry{kFreeSlot, j} : CarriedEntry{ordered_key(retention_key(gate, p.age_decay, position)), position};
    }
  }
  cluster_wait();
  const bool carries = __syncthreads_or(holds);
  if (mine == 0) {
    const int others = (kBlocks - 1) * scan.padded, carried = carries ? p.capacity - scan.carried() : 0;
    arrive_expect(scan.at(&Memory::codes), ((kBlocks - 1) * scan.top + carried) * 4);
    arrive_expect(scan.at(&Memory::sets), (kBlocks - 1) * scan.chunks * ((scan.padded / kWarp + 1) / 2) * 16);
    arrive_expect(scan.at(&Memory::keys), others * 8);
    arrive_expect(scan.at(&Memory::stays), (p.capacity + scan.carried()) * 8 + (scan.block == 0 ? kBlocks * 4 : 0));
  }
  if (carries) {
    scan.rank_carried();
  } else {
    scan.rank_free();
  }
#pragma unroll 1
  for (int c = mine; c < scan.top; c += kThreads) {
    uint64_t key = c < scan.tokens ? kNotOffered : 0;
    uint32_t code = c < scan.tokens ? kNotOfferedCode + c : c - scan.tokens;
    if (scan.offered(c)) {
      const double exact = retention_key(c == mine ? first_logit : scan.logit(c), p.age_decay, scan.position(c));
      key = ordered_key(exact);
      code = code_of(exact);
    }
    if (c >= scan.padded) {
      scan.at(&Memory::code)[scan.block * p.stride + c] = 0;
      continue;
    }
    scan.at(&Memory::raw_key)[c] = key;
    scan.at(&Memory::raw_code)[c] = code;
  }
  scan.sort();
  scan.send_all(scan.at(&Memory::code) + scan.block * p.stride, scan.top / 4, scan.at(&Memory::codes), kWarps - kBlocks + 1);
  scan.send_sets();
  scan.send_all(scan.at(&Memory::key) + scan.block * p.most_tokens, scan.padded / 2, scan.at(&Memory::keys), kWarps - kBlocks + 1);
  scan.write_sinks();
  scan.write_idle_rows();
  __syncthreads();
  wait(scan.at(&Memory::codes), 0);
  scan.find_stays();
  __syncthreads();
  scan.send_stays();
  if (mine < kWarp) {
    int count = 0;
    for (int w = mine; w < p.words; w += kWarp) count += __popc(scan.at(&Memory::arrives)[w]);
    count = __reduce_add_sync(kAllLanes, count);
    if (mine == 0) {
      send(remote_address(scan.at(&Memory::arrived) + scan.block, 0), static_cast<uint32_t>(count),
           remote_address(scan.at(&Memory::stays), 0));
    }
  }
  __syncthreads();
  wait(scan.at(&Memory::stays), 0);
  scan.write_rows();
}

// The arrivals of a sequence: the last of its groups to get here knows those of all. One thread.
template <class T>
__device__ inline void count_arrivals(const GroupScan<T>& scan) {
  const RetentionClusters& p = scan.p;
  const int64_t pinned = min(scan.sequence.last_end(p), static_cast<int64_t>(p.num_sinks)) - scan.sequence.evicted;
  int count = pinned > 0 ? static_cast<int>(pinned) : 0;
  for (int i = 0; i < kBlocks; ++i) count += scan.at(&Memory::arrived)[i];
  if (p.gate_groups > 1) {
    const int before = atomicAdd(p.arrived + scan.sequence.number, count + (1 << kCountBits));
    count += before & ((1 << kCountBits) - 1);
    if (before >> kCountBits < p.gate_groups - 1) return;
  }
  write_counts(p, scan.sequence.number, count, 0);
}

// The first blocks scan, and then copy what is in the bank into the new state; the others copy the ring and the sinks.
template <class T>
__global__ void __launch_bounds__(kThreads) retention_clusters_kernel(RetentionClusters p) {
  extern __shared__ __align__(16) unsigned char shared[];
  using A = acc_t<T>;
  const int scans = static_cast<int>(p.sequences) * p.gate_groups * kBlocks, block = static_cast<int>(blockIdx.x);
  const bool scanning = block < scans;
  if (scanning && threadIdx.x == 0) {
    const auto barrier = [&](uint64_t* offset) { return reinterpret_cast<uint64_t*>(shared + reinterpret_cast<size_t>(offset)); };
    init_barrier(barrier(p.memory.codes), 1);
    init_barrier(barrier(p.memory.sets), 1);
    init_barrier(barrier(p.memory.keys), 1);
    init_barrier(barrier(p.memory.stays), kBlocks * kWarps + 1);
    fence_barrier_init();
  }
  if (scanning) clear_memory(p, shared);
  cluster_arrive_relaxed();
  wait_for_stream();
  let_next_start();
  int number, part = 0;  // of the sequence and gate group
  if (scanning) {
    number = block / kBlocks;
  } else {
    number = (block - scans) / p.ring_parts;
    part = block - scans - number * p.ring_parts;
    if (number >= scans / kBlocks) return;
  }
  const int n = number / p.gate_groups, group = number - n * p.gate_groups, slots = p.exact_slots;
  // Both at once: what a slot holds and where the sequence stands.
  const int64_t state = number;
  const bool mine = scanning && static_cast<int>(threadIdx.x) < slots;
  const int64_t first_position = mine ? p.exact_pos[state * slots + threadIdx.x] : -1;
  const A first_gate = mine ? static_cast<const A*>(p.state_gate)[state * (p.window + slots) + p.window + threadIdx.x] : A(0);
  const auto sequence = SequencePlan::of(p, n);
  const GroupScan<T> scan(p, shared, sequence, group);
  if (scanning) scan_group(scan, first_position, first_gate);

  const int count = scanning ? scan.carried() : min(p.window + p.num_sinks - part * kWarps, kWarps);
#pragma unroll 1
  for (int task = warp_id(); task < count; task += kWarps) {
    const Held held = scanning ? scan.at(&Memory::last)[task] : Held{};
    const auto find_slot = [&] { return scanning ? p.window + p.num_sinks + scan.slot_of(held.code) : part * kWarps + task; };
    int source = held.source;
    if (!scanning) {
      const int slot = find_slot();
      const int ahead = slot - sequence.ring_slot + (slot < sequence.ring_slot ? p.window : 0), rest = sequence.length - 1 - ahead;
      if (slot >= p.window) {
        source = sequence.sink_source(p, group, slot - p.window, sequence.last_end(p));
      } else {
        source = rest < 0 ? slot : p.window + slots + ahead + p.by_window.quotient(rest) * p.window;
      }
    }
    const bool bank = scanning || part * kWarps + task >= p.window;
    int64_t position = -1;
    if (bank && source >= 0) {
      const int ahead = source - p.window - slots, back = sequence.ring_slot - source;
      position = ahead >= 0 ? sequence.first + ahead
                 : source >= p.window ? p.exact_pos[state * slots + source - p.window]
                                      : sequence.first - (back > 0 ? back : back + p.window);
    }
    const int slot = copy_slot<T>(p, sequence, group, source < 0 ? find_slot() : source, bank, position, find_slot);
    if (lane_id() > 0) continue;
    if (slot == 0 && group == 0) p.new_tokens_seen[n] = sequence.first + sequence.length;
    if (bank) {
      p.source[state * slots + slot - p.window] = source;
      p.new_exact_pos[state * slots + slot - p.window] = position;
    }
  }
  if (!scanning || threadIdx.x > 0) return;
  wait(scan.at(&Memory::keys), 0);
  if (scan.block == 0) count_arrivals(scan);
}

// Before it: nothing has been counted. Brings what the scan reads first into the cache that all share; others may still write it.
__global__ void __launch_bounds__(kBeginThreads) retention_begin_kernel(RetentionClusters p) {
  const auto fetch = [&](const void* from, size_t bytes) {
    for (size_t i = 128 * threadIdx.x; i < bytes; i += 128 * kBeginThreads) fetch_line(static_cast<const char*>(from) + i);
  };
  const size_t states = p.sequences * p.gate_groups;
  fetch(p.cu_seqlens, (p.sequences + 1) * sizeof(int64_t));
  fetch(p.tokens_seen, p.sequences * sizeof(int64_t));
  fetch(p.gate, p.tokens * p.gate_groups * p.gate_bytes);
  fetch(p.exact_pos, states * p.exact_slots * sizeof(int64_t));
  fetch(p.state_gate, states * (p.window + p.exact_slots) * p.gate_bytes);
  wait_for_stream();
  let_next_start();
  for (int n = threadIdx.x; n < p.sequences; n += kBeginThreads) p.arrived[n] = 0;
}

template <class T>
bool fit(const RetentionClusters& p) {
  return p.tokens <= kMostTokens && p.gate_groups == p.kv_heads && p.shared <= kClusterShared && std::max(p.stride, p.carried_stride) <= 2 * kMostSteps + 4 &&
         clusters_fit(retention_clusters_kernel<T>, p.sequences * p.gate_groups, kBlocks, kThreads, p.shared);
}

}  // namespace

bool serves(const BankScanForward& params, DType dtype) {
  const RetentionClusters p(params);
  return dispatch(dtype, [&](auto zero) { return fit<decltype(zero)>(p) ? cudaSuccess : cudaErrorNotSupported; }) == cudaSuccess;
}

cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  RetentionClusters p(params);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    p.wide = wide_rows<T>(p);
    p.gate_bytes = sizeof(acc_t<T>);
#ifdef SCAN_DEV
    if (dev_mode != 2)
#endif
    if (p.gate_groups > 1) {
      const auto status = launch_early(retention_begin_kernel, dim3(1), kBeginThreads, 0, stream, p);
      if (status != cudaSuccess) return status;
    }
    const int64_t ring = p.sequences * p.gate_groups * p.ring_parts;
    return launch_clusters(retention_clusters_kernel<T>, p.sequences * p.gate_groups + (ring + kBlocks - 1) / kBlocks, kBlocks,
                           kThreads, p.shared, stream, p);
  });
}

}  // namespace coda::kernels::sm90
