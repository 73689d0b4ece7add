#pragma once

#include "retention_shared.cuh"

namespace coda::kernels::sm90::retention {

using namespace hopper;

// One block of the cluster that scans one gate group of a sequence, which is one KV head's (`retention_served`).
template <class T>
struct GroupScan {
  using A = acc_t<T>;
  const RetentionClusters& p;
  unsigned char* shared;
  const SequencePlan& sequence;
  int group, block;
  int lead, evicting;          // chunk rows before the first chunk that evicts, and those from there on
  int chunks, tokens, padded;  // of a block, as in RetentionClusters
  int begin, used;             // of this one

  __device__ GroupScan(const RetentionClusters& params, unsigned char* memory, const SequencePlan& plan, int g)
      : p(params), shared(memory), sequence(plan), group(g), block(cluster_rank()) {
    lead = p.by_chunk.quotient(-sequence.first_id);
    evicting = max(sequence.chunks - lead, 0);
    chunks = max((evicting + kBlocks - 1) / kBlocks, 1);
    tokens = chunks * p.chunk;
    padded = (tokens + kWarp - 1) / kWarp * kWarp;
    begin = block * chunks;
    used = min(max(evicting - begin, 0), chunks);
  }

  template <class X>
  __device__ X* at(X* Memory::*array) const {
    return reinterpret_cast<X*>(shared + reinterpret_cast<size_t>(p.memory.*array));
  }
  __device__ int64_t state() const { return sequence.state_row(p, group); }
  __device__ int64_t position(int c) const { return sequence.evicted + begin * p.chunk + c; }
  __device__ bool offered(int c) const { return c < used * p.chunk && position(c) >= p.num_sinks; }
  __device__ A logit(int c) const {
    const int fresh = static_cast<int>(position(c) - sequence.first);
    const A* from =
        fresh < 0
            ? static_cast<const A*>(p.state_gate) + state() * (p.window + p.exact_slots) + sequence.source_of(p, position(c))
            : static_cast<const A*>(p.gate) + static_cast<int64_t>(sequence.token0 + fresh) * p.gate_groups + group;
    return *from;
  }
  __device__ int2* come(int owner, int b) const { return at(&Memory::come) + (owner * p.most_chunks + b) * p.words; }
  // How many of the first `place` tokens of a list have come when chunk b of its block reads the banks.
  __device__ int below(int owner, int b, int place) const {
    const int bit = max(place - 1, 0);
    const int2 word = come(owner, b)[bit / kWarp];
    return place > 0 ? word.y + __popc(word.x & kAllLanes >> (kWarp - 1 - bit % kWarp)) : 0;
  }
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
  // Of the KV head that the group is of.
  __device__ const T* row_of(const void* state_rows, const void* fresh_rows, int source) const {
    const int held = p.window + p.exact_slots;
    return source < held ? static_cast<const T*>(state_rows) + (state() * held + source) * p.dim
                         : static_cast<const T*>(fresh_rows) +
                               (static_cast<int64_t>(sequence.token0 + source - held) * p.kv_heads + group) * p.dim;
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
      uint64_t* key = at(&Memory::carried_key) + rank;
      const uint32_t mine_code = mine.key == kFreeSlot ? kFreeCode : code_of(key_of(mine.key));
      if (lane_id() >= kBlocks) continue;
      if (to != block) {
        send(remote_address(code, to), mine_code, remote_address(at(&Memory::codes), to));
        send(remote_address(key, to), static_cast<uint32_t>(mine.key), static_cast<uint32_t>(mine.key >> 32),
             remote_address(at(&Memory::keys), to));
      } else {
        *code = mine_code;
        *key = mine.key;
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
      at(&Memory::carried_key)[rank] = kFreeSlot;
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
        int above[kLists], from[kLists];
#pragma unroll
        for (int l = 0; l < kLists; ++l) {
          above[l] = 0;
          from[l] = min(r + half * kLists + l, runs - 1) * kWarp;
        }
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
          for (int l = 0; l < kLists; ++l) above[l] += run_code[from[l] + above[l] + step - 1] > mine ? step : 0;
        }
#pragma unroll
        for (int l = 0; l < kLists; ++l) {
          const int run = r + half * kLists + l;
          const uint32_t next = run_code[from[l] + above[l]];
          above[l] += next > mine;
          if (run >= runs || run == i / kWarp) {
            above[l] = 0;
          } else if (next == mine) {
            above[l] = count_exactly(run_key + from[l], kWarp, key - (run > i / kWarp));
          }
          rank += above[l];
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

  // A code below which no token of the block comes in: of k lists before its own, each has the capacity's k-th part of better
  // ones; and so has the carried bank. One warp.
  __device__ uint32_t least_entering() const {
    if (p.capacity == 0) return kAllLanes;
    const int half = (p.capacity + 1) / 2;
    const uint32_t carried = at(&Memory::carried_code)[p.capacity > 1 ? p.carried_stride + p.capacity / 2 - 1 : half - 1];
    const int of_each = block > 0 ? (p.capacity + block - 1) / block : padded + 1;
    if (of_each > padded) return carried;
    const uint32_t mine = lane_id() < block ? at(&Memory::code)[lane_id() * p.stride + of_each - 1] : kAllLanes;
    return max(carried, __reduce_min_sync(kAllLanes, mine));
  }

  // Finds when each of the block's tokens and of its share of the carried bank leaves.
  __device__ void find_stays() const {
    const uint32_t *code = at(&Memory::code), *carried_code = at(&Memory::carried_code);
    const int entries = tokens + carried(), half = lane_id() / kHalf;
    const int top = 1 << (32 - __clz(padded)), carried_top = p.carried_stride - 4;
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
      const uint32_t mine = is_token           ? code[block * p.stride + e]
                            : key == kFreeSlot ? kFreeCode
                            : valid            ? code_of(key_of(key))
                                               : kAllLanes;
      int from[kLists], better = half * p.carried_stride;
#pragma unroll
      for (int l = 0; l < kLists; ++l) from[l] = (half * kLists + l) * p.stride;
#pragma unroll 1
      for (int step = max(top, carried_top) / 2; step > 0; step /= 2) {
        if (step < top) {
#pragma unroll
          for (int l = 0; l < kLists; ++l) from[l] += code[from[l] + step - 1] > mine ? step : 0;
        }
        if (step < carried_top) better += carried_code[better + step - 1] > mine ? step : 0;
      }
      // Between equal keys the later token is the better one.
      int above[kLists], other[kLists];
#pragma unroll
      for (int l = 0; l < kLists; ++l) {
        const int list = half * kLists + l;
        above[l] = from[l] - list * p.stride;
        if (list == own) {
          above[l] = e;
        } else if (code[from[l]] == mine && key > kFreeSlot) {
          wait(at(&Memory::keys), 0);
          const uint64_t* keys = at(&Memory::key) + list * p.most_tokens;
          const uint64_t next = keys[above[l]], least = key - (list > own);
          if (code[from[l] + 1] != mine) {
            above[l] += next > least;
          } else {
            above[l] = count_exactly(keys, padded, least);
          }
        }
      }
      better -= half * p.carried_stride;
      if (is_token && key > kFreeSlot && carried_code[half * p.carried_stride + better] == mine) {
        wait(at(&Memory::keys), 0);
        const int first = half * ((p.capacity + 1) / 2);
        better = count_exactly(at(&Memory::carried_key) + first, half == 0 ? (p.capacity + 1) / 2 : p.capacity / 2, key);
      }
#pragma unroll
      for (int l = 0; l < kLists; ++l) other[l] = __shfl_xor_sync(kAllLanes, above[l], kHalf);
      better += __shfl_xor_sync(kAllLanes, better, kHalf);
      int sum = is_token ? better : valid ? static_cast<int>(at(&Memory::mine)[i].order) : p.capacity;
      int in = -1, before = 0,
          place = 0;  // the block in whose chunks it leaves, its rank before them, its place among their tokens
      int ranks[kLists];
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) {
        const int mine_of = (s < kLists) == (half == 0) ? above[s % kLists] : other[s % kLists];
        const bool here = s >= own && in < 0 && sum + mine_of >= p.capacity;
        in = here ? s : in;
        before = here ? sum : before;
        place = here ? mine_of : place;
        sum += mine_of;
        if ((s < kLists) == (half == 0)) ranks[s % kLists] = min(sum, p.capacity);
      }
      // It leaves in the first of that block's chunks in which the bank is full with better ones.
      int low = 0, last = before;
      wait(at(&Memory::sets), 0);
      if (in >= 0) {
#pragma unroll 4
        for (int b = half; b < chunks; b += 2) {
          const int rank = before + below(in, b, place);
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
        at(&Memory::stay)[e] = {static_cast<short>(!enters  ? -1
                                                   : in < 0 ? evicting
                                                            : in * chunks + low),
                                static_cast<short>(last)};
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
        const T* row = row_of(half == 0 ? p.state_k : p.state_v, half == 0 ? p.k : p.v, source);
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
  // The strip before entries come in: the sinks are there.
  __device__ void clear_strip() const {
#pragma unroll 1
    for (int b = warp_id(); b < used; b += kWarps) {
#pragma unroll 1
      for (int j = lane_id(); j < p.exact_slots; j += kWarp) {
        at(&Memory::strip)[b * p.exact_slots + j] =
            j < p.num_sinks ? sink_source(j, sequence.evicted + (begin + b + 1) * p.chunk) : kAsBefore;
      }
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
    for (int x = threadIdx.x; x < used * p.exact_slots; x += kThreads) {
      int source = strip[x];
#pragma unroll 1
      for (int before = x; source == kAsBefore;) source = strip[before -= p.exact_slots];
      const int b = p.by_slots.quotient(x);
      index_row(lead + begin + b)[x - b * p.exact_slots] = source;
    }
  }

  // Copies what stays into the exact slots of the new state: of the bank the block's share, by rank; of the sinks, which are
  // known from the first, one in kBlocks, by the last warp.
  __device__ void write_exact_slots(bool bank) const {
    const int count = bank ? carried() : p.num_sinks > block ? (p.num_sinks - block + kBlocks - 1) / kBlocks : 0;
    if (!bank && warp_id() < kWarps - 1) return;
#pragma unroll 1
    for (int i = bank ? warp_id() : 0; i < count; i += bank ? kWarps : 1) {
      int slot = block + i * kBlocks, source;
      if (bank) {
        const Held held = at(&Memory::last)[i];
        source = held.source;
        slot = p.num_sinks + slot_of(held.code);
      } else {
        source = sink_source(slot, sequence.last_end(p));
      }
      const int ahead = source - p.window - p.exact_slots, back = sequence.ring_slot - source;
      int64_t position = sequence.first + ahead;
      if (source < p.window) {
        position = source < 0 ? -1 : sequence.first - (back > 0 ? back : back + p.window);
      } else if (ahead < 0) {
        position = p.exact_pos[state() * p.exact_slots + source - p.window];
      }
      copy_slot(slot, source, position);
      if (lane_id() > 0) continue;
      p.source[state() * p.exact_slots + slot] = source;
      p.new_exact_pos[state() * p.exact_slots + slot] = position;
    }
  }
  // As copy_slots, all loads first.
  __device__ void copy_slot(int slot, int source, int64_t position) const {
    const int held = p.window + p.exact_slots, dim = p.dim, from = source < 0 ? p.window + slot : source;
    const int64_t slots = state() * held;
    const bool fresh = from >= held, turned = p.has_bank_distance && (from < p.window || fresh);
    const T *key = row_of(p.state_k, p.k, from), *value = row_of(p.state_v, p.v, from);
    const int64_t new_row = (slots + p.window + slot) * dim;
    T *new_key = static_cast<T*>(p.new_k) + new_row, *new_value = static_cast<T*>(p.new_v) + new_row;
    constexpr int kElements = 16 / sizeof(T);
    const int packets = p.wide ? dim / kElements : 0, lane = lane_id();
    uint4 packet{};
    if (lane < packets) packet = reinterpret_cast<const uint4*>(value)[lane];
    A logit{};
    if (lane == 0) {
      logit = fresh ? static_cast<const A*>(p.gate)[static_cast<int64_t>(sequence.token0 + from - held) * p.gate_groups + group]
                    : static_cast<const A*>(p.state_gate)[slots + from];
    }
#pragma unroll 1
    for (int i = lane; i < dim / 2; i += 2 * kWarp) {
      const int other = i + kWarp < dim / 2 ? i + kWarp : i;
      const int a0 = first_of_pair(i, p.rope_interleaved), b0 = second_of_pair(i, dim, p.rope_interleaved);
      const int a1 = first_of_pair(other, p.rope_interleaved), b1 = second_of_pair(other, dim, p.rope_interleaved);
      T ka = key[a0], kb = key[b0], la = key[a1], lb = key[b1];
      if (turned) {
        const auto first = rope_angle<A>(-position, at(&Memory::inv_freq)[i]);
        const auto second = rope_angle<A>(-position, at(&Memory::inv_freq)[other]);
        A a = widen(ka), b = widen(kb);
        turn_pair(a, b, first);
        ka = narrow<T>(a);
        kb = narrow<T>(b);
        a = widen(la), b = widen(lb);
        turn_pair(a, b, second);
        la = narrow<T>(a);
        lb = narrow<T>(b);
      }
      new_key[a0] = ka;
      new_key[b0] = kb;
      new_key[a1] = la;
      new_key[b1] = lb;
    }
    if (lane < packets) reinterpret_cast<uint4*>(new_value)[lane] = packet;
#pragma unroll 1
    for (int i = lane + kWarp; i < packets; i += kWarp) {
      reinterpret_cast<uint4*>(new_value)[i] = reinterpret_cast<const uint4*>(value)[i];
    }
#pragma unroll 1
    for (int i = lane; i < (p.wide ? 0 : dim); i += kWarp) new_value[i] = value[i];
    if (lane == 0) static_cast<A*>(p.new_gate)[slots + p.window + slot] = logit;
  }
};

}  // namespace coda::kernels::sm90::retention
