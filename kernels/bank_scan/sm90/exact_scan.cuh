#pragma once

#include "../../common/mma.cuh"
#include "candidates.cuh"
#include "cluster.cuh"
#include "routing.cuh"

namespace coda::kernels::sm90 {

// Shared memory of one block of the exact bank's cluster, which holds one KV head. Columns are slots, to a multiple of 4.
template <class T>
struct ExactLayout {
  static constexpr int kBuffers = 3;
  int groups;       // of 4 slots
  T* slot;          // (columns, D) values
  float* norm;      // (columns)
  T* candidate;     // (3, 8, D) of this chunk and the next two
  float* gram;      // (3, 8, 8)
  float* cosine;    // (2, Hkv, groups, 32): what each head sent, of this chunk and the next
  float* score;     // (8, columns)
  int* taken;       // (columns) the candidate that a slot took in this chunk, -1 none
  int64_t* position;  // (columns)
  int* source;        // (columns)

  __host__ __device__ int columns() const { return groups * kTileColumns; }
  __host__ __device__ int numbers() const { return groups * kTile; }
  __host__ __device__ ExactLayout(Carver& carver, const BankScanParams& p)
      : groups((p.exact_slots + kTileColumns - 1) / kTileColumns), slot(carver.take<T>(int64_t{columns()} * p.dim)),
        norm(carver.take<float>(columns())), candidate(carver.take<T>(int64_t{kBuffers} * kTileRows * p.dim)),
        gram(carver.take<float>(kBuffers * kTileRows * kTileRows)), cosine(carver.take<float>(int64_t{2} * p.kv_heads * numbers())),
        score(carver.take<float>(kTileRows * columns())), taken(carver.take<int>(columns())),
        position(carver.take<int64_t>(columns())), source(carver.take<int>(columns())) {}
};

// A cluster walks the chunks of one sequence. Every block has the scores of all heads and decides for itself, alike.
template <class T, int kParts>
__device__ inline void scan_exact_bank(const BankScan& p, int64_t n, unsigned char* shared, uint64_t* arrived) {
  constexpr int dim = kParts * kWarp, kPackets = dim / kPacket;
  constexpr int kBuffers = ExactLayout<T>::kBuffers;
  const int head = cluster_rank(), heads = p.kv_heads, slots = p.exact_slots, sinks = p.num_sinks;
  Carver carver(shared), global(p.workspace);
  const ExactLayout<T> work(carver, p);
  const CandidateLists lists(global, p, p.banks);
  const ScanView<T> view(p, n);
  const Span& span = view.span;
  const uint32_t bytes = static_cast<uint32_t>(heads * work.numbers() * sizeof(float));
  if (threadIdx.x == 0) {
    for (int turn = 0; turn < 2; ++turn) {
      hopper::init_barrier(arrived + turn, 1);
      hopper::arrive_expect(arrived + turn, bytes);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  cluster_arrive();

  // The chunks from `first` on evict.
  int64_t first = 0;
  while (first < span.chunks && !view.evicts(span.chunk_start(first, p.chunk))) ++first;
  // Candidates come two chunks ahead, and the list that names them three.
  const int my_row = static_cast<int>(threadIdx.x) / kPackets, my_packet = threadIdx.x % kPackets;
  const auto listed = [&](int64_t i) {
    return my_row < kTileRows && i < span.chunks ? lists.exact_source[(span.row0 + i) * 2 * kExactCandidates + my_row] : -1;
  };
  const auto fetch = [&](int64_t i, int source) {
    const int buffer = static_cast<int>(i % kBuffers);
    if (my_row < kTileRows) {
      if (source >= 0) {
        ampere::copy_packet(work.candidate + (buffer * kTileRows + my_row) * dim + my_packet * kPacket,
                            view.value(source, head) + my_packet * kPacket, true);
      }
    } else if (const int item = threadIdx.x - kTileRows * kPackets; item < kTileRows * kTileRows / 4 && i < span.chunks) {
      ampere::copy_packet(work.gram + buffer * kTileRows * kTileRows + item * 4,
                          lists.exact_gram + (span.row0 + i) * kTileRows * kTileRows + item * 4, true);
    }
    ampere::commit_copies();
  };
  // Of the candidate that this lane meets in a tile.
  const auto norm_of = [&](int64_t i) {
    return i < span.chunks ? lists.exact_norm[((span.row0 + i) * heads + head) * kTileRows + lane_id() / kTileColumns] : 0.0f;
  };
  const auto candidate_of = [&](int64_t i, int what) {
    return lane_id() < kExactCandidates && i < span.chunks
               ? lists.exact_source[((span.row0 + i) * 2 + what) * kExactCandidates + lane_id()]
               : -1;
  };

  // Warp 0 keeps the bank, lane by lane.
  const NoveltyRule rule{slots, sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
  const float tau_novel = float_threshold(p.tau_novel), tau_match = float_threshold(p.tau_match);
  SlotRegisters bank;
  int64_t inserts = 0, hits = 0;
  const auto write_index = [&](int32_t* to) {
    if (warp_id() != 0 || head != 0) return;
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      const int j = bank.slot_of(u);
      if (j < slots) to[j] = bank.occupant[u] == bank.kFree ? -1 : work.source[j];
    }
  };
  if (warp_id() == 0) {
    for (int j = lane_id(); j < slots; j += kWarp) {
      work.position[j] = p.exact_pos[n * slots + j];
      work.source[j] = p.window + j;
    }
    bank.load(slots, [&](int j) { return p.exact_pos[n * slots + j] >= 0; }, [&](int j) { return p.last_touch[n * slots + j]; });
  }
  for (int j = warp_id(); j < slots; j += warp_count()) {
    const T* from = view.value(p.window + j, head);
    float mine[kParts];
    load_lane_row(mine, from);
    const float norm = lane_norm(mine);
    for (int d = lane_id(); d < dim; d += kWarp) work.slot[j * dim + d] = from[d];
    if (lane_id() == 0) work.norm[j] = norm;
  }
  for (int64_t i = 0; i < first; ++i) write_index(p.index + view.index_row(i, 0));
  fetch(first, listed(first));
  fetch(first + 1, listed(first + 1));
  int next_listed = listed(first + 2);
  float next_norm = norm_of(first);
  int next_source = candidate_of(first, 0), next_offset = candidate_of(first, 1);
  ampere::wait_copies<1>();
  __syncthreads();
  cluster_wait();
  uint32_t parity = 0;
  for (int64_t i = first; i < span.chunks; ++i) {
    const int64_t evicted = span.chunk_start(i, p.chunk) - p.window;
    const int turn = static_cast<int>(i - first) & 1, buffer = static_cast<int>(i % kBuffers);
    const float candidate_norm = next_norm;
    const int my_source = next_source, my_offset = next_offset;
    if (const int pinned = view.sinks_at(evicted + p.window); pinned > 0) {
      for (int c = warp_id(); c < pinned; c += warp_count()) {
        const int j = static_cast<int>(evicted) + c;
        const T* from = view.value(view.source_of(j), head);
        float mine[kParts];
        load_lane_row(mine, from);
        const float norm = lane_norm(mine);
        for (int d = lane_id(); d < dim; d += kWarp) work.slot[j * dim + d] = from[d];
        if (lane_id() == 0) work.norm[j] = norm;
      }
      if (warp_id() == 0) {
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) {
          const int j = bank.slot_of(u);
          if (j < evicted || j >= evicted + pinned) continue;
          work.position[j] = j;
          work.source[j] = view.source_of(j);
          bank.occupant[u] = bank.kHeld;
          bank.touched[u] = bank.ordered(j);
          bank.first = min(bank.first, j);
        }
        bank.first = __reduce_min_sync(kAllLanes, bank.first);
        inserts += pinned;
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int group = warp_id(); group < work.groups; group += warp_count()) {
      float column[kTileColumns][kParts];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) load_lane_row(column[j], work.slot + (group * kTileColumns + j) * dim);
      const float dot = tile_dots<true>(column, [&](float(&to)[kParts], int c) {
        load_lane_row(to, work.candidate + (buffer * kTileRows + c) * dim);
      });
      const float cosine = div_rn(dot, mul_rn(candidate_norm, work.norm[group * kTileColumns + lane_id() % kTileColumns]));
      const float* to = work.cosine + (turn * heads + head) * work.numbers() + group * kTile + lane_id();
#pragma unroll 1
      for (int block = 0; block < heads; ++block) {
        send(remote_address(to, block), cosine, remote_address(arrived + turn, block));
      }
    }
    wait_cluster(arrived + turn, parity);
    for (int item = threadIdx.x; item < work.numbers(); item += blockDim.x) {
      const float* from = work.cosine + turn * heads * work.numbers() + item;
      float total = 0.0f;
#pragma unroll 8
      for (int h = 0; h < heads; ++h) total = add_rn(total, from[h * work.numbers()]);
      work.score[item % kTile / kTileColumns * work.columns() + item / kTile * kTileColumns + item % kTileColumns] =
          div_rn(total, static_cast<float>(heads));
    }
    __syncthreads();
    if (threadIdx.x == 0) hopper::arrive_expect(arrived + turn, bytes);
    parity ^= turn;
    fetch(i + 2, next_listed);
    next_listed = listed(i + 3);
    next_norm = norm_of(i + 1);
    if (warp_id() == 0) {
      next_source = candidate_of(i + 1, 0);
      next_offset = candidate_of(i + 1, 1);
      const int count = __popc(__ballot_sync(kAllLanes, my_source >= 0));
      const float* gram = work.gram + buffer * kTileRows * kTileRows;
      for (int c = 0; c < count; ++c) {
        int slot;
        const auto action = bank.route(
            rule, tau_novel, tau_match, c, evicted + __shfl_sync(kAllLanes, my_offset, c),
            [&](int j) { return work.score[c * work.columns() + j]; }, [&](int other) { return gram[c * kTileRows + other]; },
            slot);
        if (action == kInsert) {
          ++inserts;
        } else {
          ++hits;
        }
      }
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        if (u * kWarp >= slots) break;
        const int j = bank.slot_of(u), c = bank.occupant[u];
        const int from = __shfl_sync(kAllLanes, my_source, max(c, 0)), offset = __shfl_sync(kAllLanes, my_offset, max(c, 0));
        if (j < work.columns()) work.taken[j] = max(c, -1);
        if (c < 0) continue;
        work.source[j] = from;
        work.position[j] = evicted + offset;
        bank.occupant[u] = bank.kHeld;
      }
      write_index(p.index + view.index_row(i, 0));
    }
    ampere::wait_copies<1>();
    __syncthreads();
    // A warp updates the slots that it alone reads.
#pragma unroll 1
    for (int group = warp_id(); group < work.groups; group += warp_count()) {
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        const int slot = group * kTileColumns + j, c = work.taken[slot];
        const float norm = __shfl_sync(kAllLanes, candidate_norm, max(c, 0) * kTileColumns);
        if (c < 0) continue;
        const auto* from = reinterpret_cast<const uint32_t*>(work.candidate + (buffer * kTileRows + c) * dim);
        for (int w = lane_id(); w < dim / 2; w += kWarp) reinterpret_cast<uint32_t*>(work.slot + slot * dim)[w] = from[w];
        if (lane_id() == 0) work.norm[slot] = norm;
      }
    }
    __syncwarp();
  }
  write_index(p.source + n * slots);
  if (warp_id() != 0 || head != 0) return;
#pragma unroll
  for (int u = 0; u < kPerLane; ++u) {
    const int j = bank.slot_of(u);
    if (j >= slots) continue;
    p.new_exact_pos[n * slots + j] = work.position[j];
    p.new_last_touch[n * slots + j] = bank.last_touch(u);
  }
  if (lane_id() == 0) {
    p.new_counts[2 * n] += inserts;
    p.new_counts[2 * n + 1] += hits;
  }
}

}  // namespace coda::kernels::sm90
