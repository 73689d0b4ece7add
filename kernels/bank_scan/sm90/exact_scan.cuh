#pragma once

#include "candidates.cuh"
#include "cluster.cuh"

namespace coda::kernels::sm90 {

// Shared memory of one block of the exact bank's cluster, which holds one KV head. Of a fixed size, so that addresses are
// constants.
template <class T, int kDim>
struct alignas(16) ExactShared {
  static constexpr int kBuffers = 3, kSlots = kPerLane * kWarp, kSent = kSlots / kTileColumns * kTilePitch;
  ExactCandidates<T, kDim> chunk[kBuffers];  // of this chunk and the next two
  T slot[kSlots * kDim];                     // values, packed for a warp
  float norm[kSlots];
  float cosine[2][kClusterBlocks][kSent];  // what each head sent, of this chunk and the next
  uint32_t key[kTileRows][kSlots];         // of the mean cosines with the slots
  Match match[kTileRows];                  // best slot
  int verdict[kTileRows];                  // slot of each candidate, plus kTouched where it was only touched; kNone
  int filled[kWarp];
  int64_t time[kSlots + kTileRows];  // last touch; then position of the candidates
};

// One block of a cluster that walks the chunks of one sequence. Every block has the scores of all heads and decides for itself,
// all alike.
template <class T, int kParts>
class ExactScan {
 public:
  __device__ ExactScan(const BankScan& params, int64_t n, unsigned char* shared, uint64_t* barriers)
      : p(params), view(params, n), carver_(params.workspace), work(*reinterpret_cast<Shared*>(shared)),
        lists(carver_, params, params.banks), sent(barriers), fetched(barriers + 2), head(cluster_rank()),
        heads(params.kv_heads), slots(params.exact_slots), sinks(params.num_sinks),
        chunks(static_cast<int>(view.span.chunks)), groups((params.exact_slots + kTileColumns - 1) / kTileColumns),
        bytes(static_cast<uint32_t>(params.kv_heads * groups * kTile * sizeof(float))) {}

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
    const NoveltyRule rule{slots, sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
    const auto order_of = [&](int j) { return order_among(work.time, kSlots + kTileRows, work.time[j]); };
    const auto used = [&](int j) { return used_ >> (j / kWarp) & 1; };
    SlotQueue queue;  // of warp 0, which routes
    uint32_t order = kSlots;
    if (warp_id() == 0) queue.load(slots, sinks, used, order_of);
    cluster_wait();
    uint32_t parity = 0, fetched_parity = 0;
    int buffer = 0, turn = 0;
#pragma unroll 1
    for (int i = first; i < chunks; ++i) {
      const int64_t evicted = span.chunk_start(i, p.chunk) - p.window;
      const auto& chunk = work.chunk[buffer];
      if (const int pinned = view.sinks_at(evicted + p.window); pinned > 0) pin(evicted, pinned);
      hopper::wait(fetched + buffer, fetched_parity);
      compare(chunk, turn);
      hopper::wait(sent + turn, parity);
      if (warp_id() < kTileRows) find_match(turn);
      __syncthreads();
      if (threadIdx.x == 0) {
        hopper::arrive_expect(sent + turn, bytes);
        fetch(i + 2, buffer == 0 ? 2 : buffer - 1);
      }
      if (warp_id() == 0) {
        const int c = lane_id() % kTileRows;
        const unsigned candidates = __ballot_sync(kAllLanes, lane_id() < kTileRows && chunk.source[c] >= 0);
        if (!counted) {
          if (lane_id() < kTileRows) {
            work.time[kSlots + c] = chunk.source[c] >= 0 ? evicted + chunk.offset[c] : INT64_MAX;
          }
          __syncwarp();
          queue.load(slots, sinks, used, order_of);
        }
        int slot;
        const RouteAction action = queue.route(
            rule, candidates, work.match[c], [&](int j) { return counted ? order + j : order_of(kSlots + j); },
            [&](int candidate, int other) { return chunk.gram[candidate % kTileRows * kTileRows + other]; },
            [&](int candidate, int j) { return work.key[candidate][j]; }, work.filled, slot);
        if (lane_id() < kTileRows) work.verdict[c] = slot < 0 ? kNone : action == kTouch ? kTouched + slot : slot;
        const int inserted = __popc(__ballot_sync(kAllLanes, action == kInsert));
        inserts_ += inserted;
        hits_ += __popc(candidates) - inserted;
        order += __popc(candidates);
      }
      __syncthreads();
      take_in(chunk, evicted, counted);
      write_index(p.index + view.index_row(i, 0));
      parity ^= turn;
      turn ^= 1;
      if (++buffer == kBuffers) {
        buffer = 0;
        fetched_parity ^= 1;
      }
    }
    write_index(p.source + view.n * slots);
    if (head != 0) return;
    const int j = threadIdx.x;
    if (j < slots) {
      p.new_exact_pos[view.n * slots + j] = position_;
      p.new_last_touch[view.n * slots + j] = time_;
    }
    if (j == 0) {
      p.new_counts[2 * view.n] += inserts_;
      p.new_counts[2 * view.n + 1] += hits_;
    }
  }

 private:
  static constexpr int kDim = kParts * kWarp;
  using Shared = ExactShared<T, kDim>;
  static constexpr int kBuffers = Shared::kBuffers, kSlots = Shared::kSlots, kSent = Shared::kSent;
  static constexpr int kNone = -1, kTouched = 1 << kSlotBits;

  // Thread 0.
  __device__ void fetch(int i, int buffer) const {
    if (i >= chunks) return;
    constexpr uint32_t size = sizeof(ExactCandidates<T, kDim>);
    hopper::arrive_expect(fetched + buffer, size);
    hopper::load_bytes(work.chunk + buffer, &lists.of<T, kDim>(view.span.row0 + i, heads, head), fetched + buffer, size);
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
    const int mine = threadIdx.x;
    if (mine < slots) {
      position_ = p.exact_pos[view.n * slots + mine];
      time_ = p.last_touch[view.n * slots + mine];
      source_ = p.window + mine;
    }
    if (mine < kSlots + kTileRows) work.time[mine] = mine < slots ? time_ : INT64_MAX;
    for (int j = lane_id(); j < slots; j += kWarp) used_ |= (p.exact_pos[view.n * slots + j] >= 0) << (j / kWarp);
#pragma unroll 1
    for (int j = warp_id(); j < slots; j += warp_count()) hold(j, view.value(p.window + j, head));
    return !__syncthreads_or(mine >= sinks && mine < slots && position_ >= 0 && time_ >= next);
  }

  __device__ void write_index(int32_t* to) const {
    const int j = threadIdx.x;
    if (head == 0 && j < slots) to[j] = position_ >= 0 ? source_ : -1;
  }

  __device__ void pin(int64_t evicted, int pinned) {
    __syncthreads();
#pragma unroll 1
    for (int c = warp_id(); c < pinned; c += warp_count()) {
      hold(static_cast<int>(evicted) + c, view.value(view.source_of(evicted + c), head));
    }
    const auto is_pinned = [&](int j) { return j >= evicted && j < evicted + pinned; };
    if (const int j = threadIdx.x; is_pinned(j)) {
      position_ = time_ = j;
      source_ = view.source_of(j);
      work.time[j] = j;
    }
    for (int j = lane_id(); j < slots; j += kWarp) used_ |= is_pinned(j) << (j / kWarp);
    inserts_ += pinned;
    __syncthreads();
  }

  // Sends this head's cosines of candidates and slots to all blocks.
  __device__ void compare(const ExactCandidates<T, kDim>& chunk, int turn) const {
    const float candidate_norm = chunk.norm[lane_id() / kTileColumns];
#pragma unroll 1
    for (int group = warp_id(); group < groups; group += warp_count()) {
      float column[kTileColumns][kParts];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) load_packed_row(column[j], work.slot + (group * kTileColumns + j) * kDim);
      const float dot =
          tile_dots<true>(column, [&](float(&to)[kParts], int c) { load_packed_row(to, chunk.value + c * kDim); });
      const float cosine = div_rn(dot, mul_rn(candidate_norm, work.norm[group * kTileColumns + lane_id() % kTileColumns]));
      const float* to = work.cosine[turn][head] + group * kTilePitch + lane_id();
#pragma unroll 1
      for (int block = 0; block < heads; ++block) send(remote_address(to, block), cosine, remote_address(sent + turn, block));
    }
  }

  // The best slot of the candidate of this warp.
  __device__ void find_match(int turn) const {
    const float reciprocal = 1.0f / static_cast<float>(heads);
    const float* from = work.cosine[turn][0] + warp_id() * kTileColumns + lane_id() % kTileColumns;
    const Match match = best_match(slots, [&](int j) {
      const uint32_t key = score_key(head_mean(from + j / kTileColumns * kTilePitch, kSent, heads, reciprocal));
      return work.key[warp_id()][j] = used_ >> (j / kWarp) & 1 ? key : 0;
    });
    if (lane_id() == 0) work.match[warp_id()] = match;
  }

  // What the verdicts change. Thread j keeps what is known of slot j, a warp the values that it alone compares.
  __device__ void take_in(const ExactCandidates<T, kDim>& chunk, int64_t evicted, bool counted) {
    int last = -1, filler = -1;  // of the slot of this thread's number: the candidates that touched and filled it last
#pragma unroll
    for (int c = 0; c < kTileRows; ++c) {
      const int verdict = work.verdict[c], slot = verdict & static_cast<int>(kSlotMask);
      const bool real = verdict != kNone, filled = real && verdict < kTouched, here = slot == static_cast<int>(threadIdx.x);
      used_ |= (filled && slot % kWarp == lane_id()) << (slot / kWarp);
      last = real && here ? c : last;
      filler = filled && here ? c : filler;
    }
    if (last >= 0) {
      time_ = evicted + chunk.offset[last];
      if (!counted) work.time[threadIdx.x] = time_;
    }
    if (filler >= 0) {
      position_ = evicted + chunk.offset[filler];
      source_ = chunk.source[filler];
    }
    const int mine = work.verdict[lane_id() / kTileColumns];
#pragma unroll 1
    for (int group = warp_id(); group < groups; group += warp_count()) {
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

  const BankScan& p;
  const ScanView<T> view;
  Carver carver_;
  Shared& work;
  const CandidateLists lists;
  uint64_t *sent, *fetched;  // barriers (2) and (3): cosines of all heads, and candidates
  const int head, heads, slots, sinks, chunks, groups;
  const uint32_t bytes;
  unsigned used_ = 0;  // bit u for slot lane + 32 u
  int64_t position_ = -1, time_ = 0;  // of the slot of this thread's number
  int source_ = -1, inserts_ = 0, hits_ = 0;
};

}  // namespace coda::kernels::sm90
