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
};

// One block of a cluster that walks the chunks of one sequence. Every block has the scores of all heads and decides for itself,
// all alike. Warp 0 decides about a chunk while the others compare the next one with the bank as it stood before this chunk: what
// fills its slots since then are candidates of this chunk, and how those compare is known beforehand.
template <class T, int kParts, int kBlocks>
class ExactScan {
 public:
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
      fetch(first, 0);
      fetch(first + 1, 1);
    }
    cluster_arrive();
    const bool counted = load_state(span.chunk_start(first, p.chunk) - p.window);
    for (int i = 0; i < first; ++i) write_index(p.index + view.index_row(i, 0));
    cluster_wait();
    const auto evicted = [&](int i) { return evicted0 + i * static_cast<int64_t>(p.chunk); };
    Router router(*this, counted);
    if (warp_id() == 0) {
      router.begin();
      if (first < chunks) pass_alone();
    } else if (first < chunks) {
      prepare(work.chunk[0], 0, 0, evicted(first));
    }
    __syncthreads();
#pragma unroll 1
    for (int i = first, at = 0; i < chunks; ++i, ++at) {
      if (warp_id() == 0) {
        router.decide(work.chunk[at % kBuffers], at % 2, evicted(i));
        inserts_ += view.sinks_at(evicted(i) + p.window);
        if (i + 1 < chunks) pass_alone();
      } else {
        if (threadIdx.x == kWarp) fetch(i + 2, (at + 2) % kBuffers);
        if (at > 0) take_in(work.chunk[(at - 1) % kBuffers], (at - 1) % 2, i - 1, evicted(i - 1));
        if (i + 1 < chunks) prepare(work.chunk[(at + 1) % kBuffers], at + 1, (at + 1) % 2, evicted(i + 1));
      }
      __syncthreads();
    }
    if (const int last = chunks - 1 - first; warp_id() > 0 && last >= 0) {
      take_in(work.chunk[last % kBuffers], last % 2, chunks - 1, evicted(chunks - 1));
    }
    write_index(p.source + view.n * slots);
    cluster_arrive();
    cluster_wait();  // what this block sent has left its shared memory
    if (rank != 0) return;
    if (const int j = own_slot(); j >= 0 && j < slots) {
      p.new_exact_pos[view.n * slots + j] = position_;
      p.new_last_touch[view.n * slots + j] = time_;
    }
    if (threadIdx.x == 0) write_counts(p, view.n, inserts_, hits_);
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
    SlotQueue queue;
    uint32_t order = kSlots;

    __device__ Router(ExactScan& scan_, bool counted_)
        : scan(scan_), rule{scan_.slots, scan_.sinks, scan_.p.tau_novel, scan_.p.tau_match, scan_.p.refresh_on_hit},
          counted(counted_) {}
    __device__ void begin() {
      load();
      if (lane_id() < kTileRows) scan.work.filled[1][lane_id()] = -1;
    }
    __device__ uint32_t order_of(int j) const {
      return order_among(scan.work.time, kSlots + kTileRows, scan.work.time[j]);
    }
    __device__ void load() {
      const auto used = [&](int j) { return scan.used_ >> (j / kWarp) & 1; };
      queue.load(scan.slots, scan.sinks, used, [&](int j) { return order_of(j); });
    }

    __device__ void decide(const ExactCandidates<T, kDim>& chunk, int turn, int64_t evicted) {
      Shared& work = scan.work;
      const int c = lane_id() % kTileRows;
      const int* const before = work.filled[turn ^ 1];
      int* const filled = work.filled[turn];
      const unsigned candidates = __ballot_sync(kAllLanes, lane_id() < kTileRows && chunk.source[c] >= 0);
      if (lane_id() < kTileRows) filled[c] = -1;
      if (!counted) {
        if (lane_id() < kTileRows) {
          work.time[kSlots + c] = chunk.source[c] >= 0 ? evicted + chunk.offset[c] : INT64_MAX;
        }
        __syncwarp();
        load();
      }
      Match match = work.match[turn][c];
      const auto put = [&](int j, uint32_t met) {
        if (lane_id() < kTileRows) work.key[turn][c][j] = met;
      };
      uint32_t compared[kTileRows];
      int fills[kTileRows];
#pragma unroll
      for (int i = 0; i < kTileRows; i += 4) {
        const uint4 keys = *reinterpret_cast<const uint4*>(chunk.before + c * kTileRows + i);
        const int4 slots = *reinterpret_cast<const int4*>(before + i);
        compared[i] = keys.x, compared[i + 1] = keys.y, compared[i + 2] = keys.z, compared[i + 3] = keys.w;
        fills[i] = slots.x, fills[i + 1] = slots.y, fills[i + 2] = slots.z, fills[i + 3] = slots.w;
      }
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        if (fills[i] < 0) continue;
        meet(match, compared[i], fills[i]);
        put(fills[i], compared[i]);
      }
      int slot;
      const RouteAction action = queue.route(
          rule, candidates, match, [&](int j) { return counted ? order + j : order_of(kSlots + j); },
          [&](int candidate, int other) { return chunk.gram[candidate % kTileRows * kTileRows + other]; },
          [&](int candidate, int j) { return work.key[turn][candidate][j]; }, filled, slot, put);
      if (lane_id() < kTileRows) work.verdict[turn][c] = slot < 0 ? kNone : action == kTouch ? kTouched + slot : slot;
      const int inserted = __popc(__ballot_sync(kAllLanes, action == kInsert));
      scan.inserts_ += inserted;
      scan.hits_ += __popc(candidates) - inserted;
      order += __popc(candidates);
      if (counted) return;
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
  };

  // Thread 0.
  __device__ void fetch(int i, int buffer) const {
    if (i >= chunks) return;
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

  // All warps but the first: scores of the chunk's candidates with the slots as they are.
  __device__ void prepare(const ExactCandidates<T, kDim>& chunk, int at, int turn, int64_t evicted) {
    if (const int pinned = view.sinks_at(evicted + p.window); pinned > 0) pin(evicted, pinned);
    hopper::wait(fetched + at % kBuffers, at / kBuffers % 2);
    compare(chunk, turn);
    if (bytes > 0) {  // not a single block
      hopper::wait(sent + turn, at / 2 % 2);
      if (threadIdx.x == kWarp) hopper::arrive_expect(sent + turn, bytes);
    }
    // By those that come last to a second tile.
    if (const int c = comparer() - (kComparing - kTileRows); c >= 0) find_match(c, turn);
  }
  // Sinks are compared with; take_in says the rest.
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

  // Sends this head's cosines of candidates and slots to all blocks.
  __device__ void compare(const ExactCandidates<T, kDim>& chunk, int turn) const {
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
    send_bytes(remote_address(from, lane_id()), from, static_cast<uint32_t>(tiles * kTilePitch * sizeof(float)),
               remote_address(sent + turn, lane_id()));
  }
  // Where a group's tile lies: those of a block together.
  static __device__ int tile(int group) {
    return (group % kBlocks * (kSlots / kTileColumns / kBlocks) + group / kBlocks) * kTilePitch;
  }

  // The best slot of candidate c. One warp.
  __device__ void find_match(int c, int turn) {
    const float reciprocal = 1.0f / static_cast<float>(heads);
    const float* from = work.cosine[turn][0] + c * kTileColumns + lane_id() % kTileColumns;
    const Match match = best_match(slots, [&](int j) {
      const uint32_t key = score_key(head_mean(from + tile(j / kTileColumns), kSent, heads, reciprocal));
      return work.key[turn][c][j] = used_ >> (j / kWarp) & 1 ? key : 0;
    });
    if (lane_id() == 0) work.match[turn][c] = match;
  }

  // What chunk i and the verdicts about it change. Thread j + 32 keeps what is known of slot j, a warp the values that it alone
  // compares.
  __device__ void take_in(const ExactCandidates<T, kDim>& chunk, int turn, int i, int64_t evicted) {
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
  int source_ = -1, inserts_ = 0, hits_ = 0;
};

}  // namespace coda::kernels::sm90
