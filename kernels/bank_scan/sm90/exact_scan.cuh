#pragma once

#include "candidates.cuh"
#include "cluster.cuh"

namespace coda::kernels::sm90 {

// Shared memory of one block of the exact bank's cluster, which holds one KV head. Of a fixed size, so that addresses are
// constants.
template <class T, int kDim>
struct alignas(16) ExactShared {
  static constexpr int kBuffers = 4, kSlots = kPerLane * kWarp, kSent = kSlots / kTileColumns * kTilePitch;
  ExactCandidates<T, kDim> chunk[kBuffers];  // of the chunk before, this one and the next two
  T slot[kSlots * kDim];                     // values, packed for a warp
  float norm[kSlots];
  // Of one chunk and the next, in turns:
  float cosine[2][kClusterBlocks][kSent];  // what each head sent
  uint32_t key[2][kTileRows][kSlots];      // of the mean cosines with the slots
  Match match[2][kTileRows];               // best slot
  int verdict[2][kTileRows];               // slot of each candidate, plus kTouched where it was only touched; kNone
  alignas(16) int filled[2][kWarp];        // slot that each candidate filled, -1 if none
  int64_t time[kSlots + kTileRows];        // last touch; then position of the candidates
  int inserts, hits;                // so far
  int oldest[kSlots], at[kSlots];    // slots in the order of their last touch, and where among them each is
};

// One block of a cluster that walks the chunks of one sequence. Every block has the scores of all heads and decides for itself,
// all alike. Warp 0 decides about a chunk while the others compare the next one with the bank as it stood before this chunk: what
// fills its slots since then are candidates of this chunk, and how those compare is known beforehand.
template <class T, int kParts, int kBlocks>
class ExactScan {
 public:
  static constexpr int kBarriers = 2 + ExactShared<T, kParts * kWarp>::kBuffers;

  __device__ ExactScan(const BankScan& params, int64_t n, unsigned char* shared, uint64_t* barriers)
      : p(params), view(params, n), work(*reinterpret_cast<Shared*>(shared)), sent(barriers), fetched(barriers + 2),
        rank(cluster_rank()), head(rank / kBlocks), part(rank % kBlocks), heads(params.kv_heads), slots(params.exact_slots),
        sinks(params.num_sinks), chunks(static_cast<int>(view.span.chunks)),
        groups((params.exact_slots + kTileColumns - 1) / kTileColumns),
        tiles((groups - part + kBlocks - 1) / kBlocks),
        bytes(static_cast<uint32_t>((params.kv_heads * groups - tiles) * kTilePitch * sizeof(float))),
        evicted0(view.span.chunk_start(0, params.chunk) - params.window) {}

  __device__ void run() {
    const Span& span = view.span;
    // The chunks from `first` on evict.
    int first = 0;
    while (first < chunks && !view.evicts(span.chunk_start(first, p.chunk))) ++first;
    if (threadIdx.x == 0) {
      for (int turn = 0; turn < 2; ++turn) {
        hopper::init_barrier(sent + turn, 1);
        hopper::arrive_expect(sent + turn, bytes);
      }
      for (int buffer = 0; buffer < kBuffers; ++buffer) hopper::init_barrier(fetched + buffer, 1);
      hopper::fence_barrier_init();
    }
    cluster_arrive();
    const bool counted = load_state(span.chunk_start(first, p.chunk) - p.window);
    for (int i = 0; i < first; ++i) write_index(p.index + view.index_row(i, 0));
    ListGate<1> lists{first};
    if (warp_id() == 0) {
      await_list(lists, first + 1);
      fetch(first, 0);
      fetch(first + 1, 1);
    }
    cluster_wait();
    const auto evicted = [&](int i) { return evicted0 + i * static_cast<int64_t>(p.chunk); };
    Router router(*this, counted);
    if (warp_id() == 0) {
      router.begin(first < chunks);
      await_list(lists, first + 2);
      if (first < chunks) pass_alone();
    } else if (first < chunks) {
      compare(work.chunk[0], 0, 0, evicted(first));
      find_matches(0, 0);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = first, at = 0; i < chunks; ++i, ++at) {
      if (warp_id() == 0) {
        router.decide(work.chunk[at % kBuffers], at % 2, evicted(i));
        await_list(lists, i + 3);
        if (i + 1 < chunks) pass_alone();
      } else {
        if (comparer() == kComparing - 1) fetch(i + 2, (at + 2) % kBuffers);
        const auto& last = work.chunk[(at + kBuffers - 1) % kBuffers];
        if (at > 0) move(last, (at - 1) % 2);
        if (i + 1 < chunks) compare(work.chunk[(at + 1) % kBuffers], at + 1, (at + 1) % 2, evicted(i + 1));
        if (at > 0) take_note(last, (at - 1) % 2, i - 1, evicted(i - 1));
        if (i + 1 < chunks) find_matches(at + 1, (at + 1) % 2);
      }
      __syncthreads();
    }
    if (const int last = chunks - 1 - first; warp_id() > 0 && last >= 0) {
      take_note(work.chunk[last % kBuffers], last % 2, chunks - 1, evicted(chunks - 1));
    }
    write_index(p.source + view.n * slots);  // seen by all blocks after this
    cluster_arrive();
    cluster_wait();  // what this block sent has left its shared memory
    if (rank != 0) return;
    if (const int j = own_slot(); j >= 0 && j < slots) {
      p.new_exact_pos[view.n * slots + j] = position_;
      p.new_last_touch[view.n * slots + j] = time_;
    }
    if (threadIdx.x == 0) {
      const int64_t begin = evicted(first), end = min(evicted(chunks), static_cast<int64_t>(sinks));
      write_counts(p, view.n, work.inserts + (first < chunks && begin < end ? end - begin : 0), work.hits);
    }
  }

 private:
  static constexpr int kDim = kParts * kWarp;
  using Shared = ExactShared<T, kDim>;
  static constexpr int kBuffers = Shared::kBuffers, kSlots = Shared::kSlots, kSent = Shared::kSent;
  static constexpr int kNone = -1, kTouched = 1 << kSlotBits;
  static constexpr int kComparing = kScanThreads / kWarp - 1;  // warps, all but the first
  static __device__ int comparer() { return warp_id() - 1; }
  // By warp 0, which has no part in the barrier of those that compare: compute-sanitizer counts the barriers that a warp has
  // passed, and takes what others wrote after one of their own for unordered.
  static __device__ void pass_alone() { hopper::sync_threads(2, kWarp); }
  // The slot that this thread keeps, negative if none: the last warps, to which no tiles fall while there are few.
  static __device__ int own_slot() { return static_cast<int>(threadIdx.x) - (kScanThreads - kSlots); }

  // Warp 0, which applies the rule.
  struct Router {
    ExactScan& scan;
    const NoveltyRule rule;
    const bool counted;
    const uint32_t novel;
    // Slots but for sinks, in the order of their last touch, lie in a ring of which this is the first place.
    int head = 0;

    __device__ Router(ExactScan& scan_, bool counted_)
        : scan(scan_), rule{scan_.slots, scan_.sinks, scan_.p.tau_novel, scan_.p.tau_match, scan_.p.refresh_on_hit},
          counted(counted_), novel(novel_key(rule)) {}
    __device__ int room() const { return rule.slots - rule.sinks; }
    __device__ int in_ring(int place) const { return head + place < room() ? head + place : head + place - room(); }
    __device__ int oldest(int place) const { return scan.work.oldest[in_ring(place)]; }
    __device__ int age(int slot) const {
      const int at = scan.work.at[slot];
      return at == kSinkAge ? kSinkAge : at < head ? at - head + room() : at - head;
    }
    __device__ void begin(bool decides) {
      if (lane_id() < kTileRows) scan.work.filled[1][lane_id()] = -1;
      if (lane_id() == 0) scan.work.inserts = scan.work.hits = 0;
      if (counted && decides) sort(by_time());
    }
    __device__ uint32_t order_of(int j) const {
      return order_among(scan.work.time, kSlots + kTileRows, scan.work.time[j]);
    }
    __device__ SlotQueue by_time() const {
      SlotQueue queue;
      const auto used = [&](int j) { return scan.used_ >> (j / kWarp) & 1; };
      queue.load(scan.slots, scan.sinks, used, [&](int j) { return order_of(j); });
      return queue;
    }
    __device__ SlotQueue by_age() const {
      SlotQueue queue;
      queue.load(scan.slots, scan.sinks, [](int) { return true; }, [&](int j) { return age(j); });
      return queue;
    }
    __device__ void sort(const SlotQueue& queue) {
      Shared& work = scan.work;
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) work.oldest[lane_id() + u * kWarp] = static_cast<int>(queue.stamp[u]);
      __syncwarp();
      int age[kPerLane] = {};
#pragma unroll 4
      for (int j = 0; j < rule.slots; ++j) {
        const uint32_t other = work.oldest[j];
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) age[u] += other < queue.stamp[u];
      }
      __syncwarp();
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        const int j = lane_id() + u * kWarp;
        const bool has = queue.stamp[u] != ~0u;
        work.at[j] = has ? age[u] : kSinkAge;
        if (has) work.oldest[age[u]] = j;
      }
      __syncwarp();
    }
    // Lane c brings the slot that candidate c touched, -1 if none: those are the youngest now.
    __device__ void touch(int slot) {
      Shared& work = scan.work;
      const int from = slot >= 0 ? age(slot) : kSinkAge;
      const bool last = __match_any_sync(kAllLanes, from) >> lane_id() == 1 && from < kSinkAge;
      const unsigned touched = __ballot_sync(kAllLanes, last), lower = (1u << lane_id()) - 1;
      int held[kPerLane], place[kPerLane], gone = 0;
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        if (u * kWarp >= room()) break;
        const int here = lane_id() + u * kWarp;
        held[u] = here < room() ? oldest(here) : 0;
        const unsigned leave = __reduce_or_sync(kAllLanes, last && from / kWarp == u ? 1u << from % kWarp : 0u);
        place[u] = here < room() && !(leave >> lane_id() & 1) ? here - gone - __popc(leave & lower) : -1;
        gone += __popc(leave);
      }
      const auto put = [&](int j, int at) {
        work.oldest[in_ring(at)] = j;
        work.at[j] = in_ring(at);
      };
      __syncwarp();
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        if (u * kWarp < room() && place[u] >= 0) put(held[u], place[u]);
      }
      if (last) put(slot, room() - gone + __popc(touched & lower));
      __syncwarp();
    }

    __device__ void decide(const ExactCandidates<T, kDim>& chunk, int turn, int64_t evicted) {
      Shared& work = scan.work;
      const int c = lane_id() % kTileRows;
      const bool kept = lane_id() < kTileRows && chunk.source[c] >= 0;
      // First four lanes a candidate, for two of this chunk's candidates and two of the last each, then lane c for candidate c.
      const int four = lane_id() / 4;
      const Match held = work.match[turn][four];
      Match match{0, kStale - 1};  // among the slots that the last chunk filled
      bool lost = false;           // its best slot was one of those
      unsigned near_one[2];
      bool number = true;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int i = lane_id() % 4 + u * 4, to = work.filled[turn ^ 1][i];
        const uint32_t met = chunk.before[four * kTileRows + i], other = chunk.gram[four * kTileRows + i];
        if (to >= 0 && (met > match.key || (met == match.key && to < match.slot))) match = {met, to};
        lost |= to == held.slot;
        near_one[u] = __ballot_sync(kAllLanes, i < four && other >= novel);
        number &= i >= four || other != kNanKey;
      }
      number = __all_sync(kAllLanes, number);
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        const Match other{__shfl_xor_sync(kAllLanes, match.key, offset), __shfl_xor_sync(kAllLanes, match.slot, offset)};
        if (other.key > match.key || (other.key == match.key && other.slot < match.slot)) match = other;
      }
      lost = __ballot_sync(kAllLanes, lost) >> four * 4 & 0xfu;
      if (match.key < held.key || (match.key == held.key && match.slot > held.slot)) {
        match = {held.key, lost ? held.slot | kStale : held.slot};
      }
      match = {__shfl_sync(kAllLanes, match.key, 4 * c), __shfl_sync(kAllLanes, match.slot, 4 * c)};
      const unsigned met = (near_one[0] >> 4 * c & 0xfu) | (near_one[1] >> 4 * c & 0xfu) << 4;
      bool near = match.key >= novel;
      if (unsigned stale = __ballot_sync(kAllLanes, kept && near && match.slot >= kStale); stale != 0) {
        note_fills(chunk, turn);
        for (; stale != 0; stale &= stale - 1) {
          const int i = __ffs(stale) - 1;
          const Match again = best_match(rule.slots, [&](int j) { return work.key[turn][i][j]; });
          if (c == i) match = again;
        }
        __syncwarp();
        near = match.key >= novel;
      }
      int slot;
      RouteAction action;
      const bool done = counted && route_at_once(rule, kept, number && match.key != kNanKey,
                                                 {match.key, near ? match.slot : rule.slots}, met,
                                                 [&](int j) { return age(j); }, [&](int place) { return oldest(place); },
                                                 slot, action);
      if (!done) action = decide_in_order(chunk, turn, evicted, match, slot);
      bool fills = action == kInsert || action == kRefresh;
      if (lane_id() < kTileRows) work.verdict[turn][c] = slot < 0 ? kNone : fills ? slot : kTouched + slot;
      // Of two candidates for one slot the later one stays.
      if (!done) fills = __match_any_sync(kAllLanes, fills ? slot : -1) >> lane_id() == 1 && fills;
      if (lane_id() < kTileRows) work.filled[turn][c] = fills ? slot : -1;
      const int count = __popc(__ballot_sync(kAllLanes, kept)), inserts = __popc(__ballot_sync(kAllLanes, action == kInsert));
      if (lane_id() == 0) {
        work.inserts += inserts;
        work.hits += count - inserts;
      }
      if (counted && done && inserts == count) {  // each took the oldest slot
        head = in_ring(count);
        return __syncwarp();
      }
      if (counted) return touch(slot);
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < kTileRows; ++i) {
        const int verdict = work.verdict[turn][i], at = verdict & static_cast<int>(kSlotMask);
        if (verdict == kNone) continue;
        if (verdict < kTouched && at % kWarp == lane_id()) scan.used_ |= 1u << (at / kWarp);
        if (lane_id() == 0) work.time[at] = evicted + chunk.offset[i];
      }
      __syncwarp();
    }
    // How this chunk's candidates compare with those of the last that fill slots.
    __device__ void note_fills(const ExactCandidates<T, kDim>& chunk, int turn) {
      const int c = lane_id() % kTileRows;
#pragma unroll 1
      for (int i = 0; i < kTileRows; ++i) {
        const int j = scan.work.filled[turn ^ 1][i];
        if (j >= 0 && lane_id() < kTileRows) scan.work.key[turn][c][j] = chunk.before[c * kTileRows + i];
      }
      __syncwarp();
    }
    // The sequential rule, for what the candidates leave to it. `match` knows what the last chunk filled.
    __device__ RouteAction decide_in_order(const ExactCandidates<T, kDim>& chunk, int turn, int64_t evicted, Match match,
                                           int& slot) {
      Shared& work = scan.work;
      const int c = lane_id() % kTileRows;
      const auto put = [&](int j, uint32_t met) {
        if (lane_id() < kTileRows) work.key[turn][c][j] = met;
      };
      note_fills(chunk, turn);
      if (!counted && lane_id() < kTileRows) {
        work.time[kSlots + c] = chunk.source[c] >= 0 ? evicted + chunk.offset[c] : INT64_MAX;
      }
      __syncwarp();
      SlotQueue queue = counted ? by_age() : by_time();
      return queue.route(
          rule, __ballot_sync(kAllLanes, lane_id() < kTileRows && chunk.source[c] >= 0), match,
          [&](int i) { return counted ? room() + i : order_of(kSlots + i); },
          [&](int candidate, int other) { return chunk.gram[candidate % kTileRows * kTileRows + other]; },
          [&](int candidate, int j) { return work.key[turn][candidate][j]; }, work.filled[turn], slot, put);
    }
  };

  __device__ void await_list(ListGate<1>& lists, int i) const {
    if (lists.await(i, chunks, [&] { return p.lists.exact_ready + view.span.row0; })) fence_async_global();
  }
  __device__ void fetch(int i, int buffer) const {
    if (i >= chunks || lane_id() != 0) return;
    constexpr uint32_t size = sizeof(ExactCandidates<T, kDim>);
    hopper::arrive_expect(fetched + buffer, size);
    hopper::load_bytes(work.chunk + buffer, &p.lists.of<T, kDim>(view.span.row0 + i, heads, head), fetched + buffer, size);
  }

  // One warp puts a value into slot j.
  __device__ void hold(int j, const T* from) const {
    float mine[kParts];
    load_lane_row(mine, from);
    const float norm = lane_norm(mine);
    pack_lane_row(work.slot + j * kDim, mine);
    if (lane_id() == 0) work.norm[j] = norm;
  }

  // Returns whether all slots were touched before position `next`. If so, as in every state that a scan leaves behind, touches
  // come in the order of their positions and need only be counted on.
  __device__ bool load_state(int64_t next) {
    const int mine = own_slot();
    if (mine >= 0 && mine < slots) {
      position_ = p.exact_pos[view.n * slots + mine];
      time_ = p.last_touch[view.n * slots + mine];
      source_ = p.window + mine;
    }
    if (const int j = static_cast<int>(threadIdx.x); j < kSlots + kTileRows) {
      work.time[j] = j < slots ? p.last_touch[view.n * slots + j] : INT64_MAX;
    }
    for (int j = lane_id(); j < slots; j += kWarp) used_ |= (p.exact_pos[view.n * slots + j] >= 0) << (j / kWarp);
#pragma unroll 1
    for (int j = warp_id(); j < slots; j += warp_count()) hold(j, view.value(p.window + j, head));
    return !__syncthreads_or(mine >= sinks && mine < slots && position_ >= 0 && time_ >= next);
  }

  __device__ void write_index(int32_t* to) const {
    const int j = own_slot();
    if (rank == 0 && j >= 0 && j < slots) to[j] = position_ >= 0 ? source_ : -1;
  }

  // Sinks are compared with; take_note says the rest.
  __device__ void pin(int64_t evicted, int pinned) {
#pragma unroll 1
    for (int c = 0; c < pinned; ++c) {
      const int j = static_cast<int>(evicted) + c;
      const int group = j / kTileColumns;
      if (group % kBlocks == part && group / kBlocks % kComparing == comparer()) hold(j, view.value(view.source_of(j), head));
      used_ |= (j % kWarp == lane_id()) << (j / kWarp);
    }
    __syncwarp();
  }

  // All warps but the first: sends this head's cosines of the chunk's candidates and the slots as they are to all blocks.
  __device__ void compare(const ExactCandidates<T, kDim>& chunk, int at, int turn, int64_t evicted) {
    if (const int pinned = view.sinks_at(evicted + p.window); pinned > 0) pin(evicted, pinned);
    hopper::wait(fetched + at % kBuffers, at / kBuffers % 2);
    const float candidate_norm = chunk.norm[lane_id() / kTileColumns];
#pragma unroll 1
    for (int group = part + comparer() * kBlocks; group < groups; group += kComparing * kBlocks) {
      float column[kTileColumns][kParts];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) load_packed_row(column[j], work.slot + (group * kTileColumns + j) * kDim);
      const float dot =
          tile_dots<true>(column, [&](float(&to)[kParts], int c) { load_packed_row(to, chunk.value + c * kDim); });
      const float cosine = div_rn(dot, mul_rn(candidate_norm, work.norm[group * kTileColumns + lane_id() % kTileColumns]));
      work.cosine[turn][head][tile(group) + lane_id()] = cosine;
    }
    hopper::fence_async_proxy();
    hopper::sync_threads(1, kComparing * kWarp);
    if (comparer() != 0 || lane_id() >= heads * kBlocks || lane_id() == rank || tiles == 0) return;
    const float* from = work.cosine[turn][head] + tile(part);
    send_bytes(remote_address(from, lane_id()), shared_address(from), static_cast<uint32_t>(tiles * kTilePitch * sizeof(float)),
               remote_address(sent + turn, lane_id()));
  }
  // Where a group's tile lies: those of a block together.
  static __device__ int tile(int group) {
    return (group % kBlocks * (kSlots / kTileColumns / kBlocks) + group / kBlocks) * kTilePitch;
  }

  // Once the cosines of all heads are there.
  __device__ void find_matches(int at, int turn) {
    if (bytes > 0) {  // not a single block
      hopper::wait(sent + turn, at / 2 % 2);
      if (threadIdx.x == kWarp) hopper::arrive_expect(sent + turn, bytes);
    }
    // By those that come last to a second tile.
    if (const int c = comparer() - (kComparing - kTileRows); c >= 0) find_match(c, turn);
  }
  // The best slot of candidate c, as best_match, but two slots at a time. One warp.
  __device__ void find_match(int c, int turn) {
    const float reciprocal = 1.0f / static_cast<float>(heads);
    const float* from = work.cosine[turn][0] + c * kTileColumns + lane_id() % kTileColumns;
    uint32_t best = 0;
    int slot = slots;
#pragma unroll 1
    for (int base = 0; base < slots; base += 2 * kWarp) {
      uint32_t key[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int j = base + u * kWarp + lane_id();
        key[u] = score_key(head_mean(from + tile(j / kTileColumns), kSent, heads, reciprocal));
        if (j >= slots || !(used_ >> (j / kWarp) & 1)) key[u] = 0;
        work.key[turn][c][j] = key[u];
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (key[u] > best) {
          best = key[u];
          slot = base + u * kWarp + lane_id();
        }
      }
    }
    const uint32_t top = __reduce_max_sync(kAllLanes, best);
    slot = __reduce_min_sync(kAllLanes, best == top ? slot : slots);
    if (lane_id() == 0) work.match[turn][c] = {top, slot};
  }

  // The verdicts about a chunk put its values into slots: each warp into those that it alone compares.
  __device__ void move(const ExactCandidates<T, kDim>& chunk, int turn) {
    const int mine = work.verdict[turn][lane_id() / kTileColumns];
#pragma unroll 1
    for (int group = part + comparer() * kBlocks; group < groups; group += kComparing * kBlocks) {
      unsigned fills = __ballot_sync(kAllLanes, mine == group * kTileColumns + lane_id() % kTileColumns);
#pragma unroll 1
      for (; fills != 0; fills &= fills - 1) {  // of two candidates for one slot the later one stays
        const int lane = __ffs(fills) - 1, c = lane / kTileColumns, slot = group * kTileColumns + lane % kTileColumns;
        packed<kParts>(work.slot + slot * kDim) = packed<kParts>(const_cast<T*>(chunk.value + c * kDim));
        if (lane_id() == 0) work.norm[slot] = chunk.norm[c];
      }
    }
    __syncwarp();
  }

  // What else chunk i and the verdicts about it change, while cosines travel. A thread keeps what is known of its own slot.
  __device__ void take_note(const ExactCandidates<T, kDim>& chunk, int turn, int i, int64_t evicted) {
    if (const int pinned = view.sinks_at(evicted + p.window); own_slot() >= evicted && own_slot() < evicted + pinned) {
      position_ = time_ = own_slot();
      source_ = view.source_of(own_slot());
    }
    const int base = own_slot() - lane_id();
    const bool keeps = base >= 0 && base < slots;
    if (keeps || !full_) {
      int last = -1, filler = -1;  // of this thread's slot: the candidates that touched and filled it last
#pragma unroll
      for (int c = 0; c < kTileRows; ++c) {
        const int verdict = work.verdict[turn][c], slot = verdict & static_cast<int>(kSlotMask);
        const bool real = verdict != kNone, filled = real && verdict < kTouched, here = slot == own_slot();
        used_ |= (filled && slot % kWarp == lane_id()) << (slot / kWarp);
        last = real && here ? c : last;
        filler = filled && here ? c : filler;
      }
      if (last >= 0) time_ = evicted + chunk.offset[last];
      if (filler >= 0) {
        position_ = evicted + chunk.offset[filler];
        source_ = chunk.source[filler];
      }
      full_ = __all_sync(kAllLanes, __popc(used_) == (slots - lane_id() + kWarp - 1) / kWarp);  // and stays so
    }
    write_index(p.index + view.index_row(i, 0));
  }

  const BankScan& p;
  const ScanView<T> view;
  Shared& work;
  uint64_t *sent, *fetched;  // barriers (2) and (4): cosines of all heads, and candidates
  const int rank, head, part, heads, slots, sinks, chunks, groups;
  const int tiles;  // groups that this block compares
  const uint32_t bytes;  // that others send of a chunk
  const int64_t evicted0;  // first position that chunk 0 would evict
  unsigned used_ = 0;  // bit u for slot lane + 32 u
  bool full_ = false;  // all are
  int64_t position_ = -1, time_ = 0;  // of this thread's slot
  int source_ = -1;
};

}  // namespace coda::kernels::sm90
