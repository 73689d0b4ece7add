#pragma once

#include "../../common/mma.cuh"
#include "../summary.cuh"
#include "candidates.cuh"
#include "cluster.cuh"
#include "routing.cuh"

namespace coda::kernels::sm90 {

constexpr int kSummaryRows = 64;  // the most slots, and the most tokens of a chunk
// Twice the most by which the mean cosine of the tensor cores can differ from the one in fixed order. Slots come as sums of two
// 16-bit numbers, off by 2^-18 of their norm, candidates as they are; 2 D / 16 accumulations, each off by 2^-21 at most, make up
// 2^-17 for D 128. So four times what there is to fear.
constexpr float kMargin = 0x1p-13f;

// Shared memory of one block of the summary bank's cluster, which holds one KV head.
template <class T, int kDim>
struct alignas(16) SummaryShared {
  static constexpr int kPitch = kDim + 16;  // of the rows that the tensor cores read: quarter-warps meet all banks
  float k[kSummaryRows * kDim], v[kSummaryRows * kDim];
  T high[kSummaryRows * kPitch], low[kSummaryRows * kPitch];  // v over its norm, as a sum
  T value[2 * kSummaryRows * kPitch];                         // candidates of this chunk and the next
  T key[kSummaryRows * kDim];
  float gate[2 * kSummaryRows], norm[2 * kSummaryRows];
  int offset[2 * kSummaryRows];
  float gram[kSummaryRows * kSummaryRows];  // mean cosines of candidates
  float2 best[kSummaryRows];                // in fixed order: slot as bits, score
  int choice[kSummaryRows];                 // slot of each candidate, -1 where the tensor cores leave it open
  int open[kSummaryRows];                   // candidates to be compared in fixed order
  int slot[kSummaryRows];                   // the decision
  float mass[kSummaryRows], slot_norm[kSummaryRows];
  float cosine[2 * kSummaryRows];  // (Hkv, owned, 128) what each head sent: of slots, then of candidates

  // Rows of candidates that one block sums over the heads, the most.
  static __host__ __device__ int owned(int heads) { return (kSummaryRows / kTileRows + heads - 1) / heads * kTileRows; }
  static __host__ __device__ size_t bytes(int heads) {
    return offsetof(SummaryShared, cosine) + sizeof(cosine) * heads * owned(heads);
  }
};

// Copies shared memory to global in the background; both at multiples of 16 bytes. One thread.
__device__ inline void store_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// One block of a cluster that walks the chunks of one sequence.
template <class T, int kParts>
class SummaryScan {
 public:
  __device__ SummaryScan(const BankScan& params, int64_t n, unsigned char* shared, uint64_t* barriers)
      : p(params), view(params, n), carver_(params.workspace), work(*reinterpret_cast<Shared*>(shared)),
        lists(carver_, params, params.banks), scored(barriers), decided(barriers + 1), head(cluster_rank()),
        heads(params.kv_heads), slots(params.summary_slots), owned(Shared::owned(params.kv_heads)),
        tau_spawn(float_threshold(params.tau_spawn)) {}

  __device__ void run() {
    if (threadIdx.x == 0) {
      hopper::init_barrier(scored, 1);
      hopper::init_barrier(decided, 1);
      hopper::fence_barrier_init();
    }
    __syncthreads();
    cluster_arrive();
    const Span& span = view.span;
    load_state();
    __syncthreads();
    for (int j = warp_id(); j < slots; j += warp_count()) refresh(j);
    int64_t i = 0;
    for (; i < span.chunks && !view.evicts(span.chunk_start(i, p.chunk)); ++i) {
      hopper::fence_async_proxy();
      __syncthreads();
      write_snapshot(i);
    }
    int count = count_of(i), free = 1;
    read_sources(i);
    read_sources(i + 1);
    fetch_values(i, source_);
    ampere::wait_copies<0>();
    __syncthreads();
    cluster_wait();
    for (; i < span.chunks; ++i) {
      const int buffer = static_cast<int>(i & 1), next_count = count_of(i + 1);
      fetch_keys();
      fetch_values(i + 1, next_source_);
      read_sources(i + 2);
      // A slot once in use stays so.
      if (free > 0) free = __syncthreads_count(threadIdx.x < slots && !(work.mass[threadIdx.x] > 0.0f));
      if (count > 0) choose(buffer, count, free);
      if (threadIdx.x == 0) wait_stores_read();
      ampere::wait_copies<1>();
      __syncthreads();
      if (count > 0) {
        update(buffer, count);
        const int64_t row = span.row0 + i;
        if (head == 0 && threadIdx.x < count) {
          p.assignment[row * p.chunk + work.offset[buffer * kSummaryRows + threadIdx.x]] = work.slot[threadIdx.x];
        }
      }
      ampere::wait_copies<0>();
      hopper::fence_async_proxy();
      __syncthreads();
      write_snapshot(i);
      count = next_count;
    }
    hopper::fence_async_proxy();
    __syncthreads();
    write(p.new_summary_k, p.new_summary_v, p.new_summary_mass, view.n);
    if (threadIdx.x == 0) wait_stores();
  }

 private:
  static constexpr int kDim = kParts * kWarp;
  using Shared = SummaryShared<T, kDim>;
  static constexpr int kPackets = kDim / kPacket, kThreads = 512;
  static constexpr int kCopies = kSummaryRows * kPackets / kThreads;  // of a thread, for all rows of a chunk

  __device__ void load_state() {
    const float* mass = static_cast<const float*>(p.state_summary_mass) + view.n * slots;
    const float* k = static_cast<const float*>(p.state_summary_k) + view.summary_row(view.n, head, 0);
    const float* v = static_cast<const float*>(p.state_summary_v) + view.summary_row(view.n, head, 0);
    for (int item = threadIdx.x; item < slots * kDim; item += blockDim.x) {
      const bool read = view.span.chunks == 0 || mass[item / kDim] > 0.0f;
      work.k[item] = read ? k[item] : 0.0f;
      work.v[item] = read ? v[item] : 0.0f;
    }
    for (int j = threadIdx.x; j < slots; j += blockDim.x) work.mass[j] = mass[j];
  }
  // The norm of slot j, and its value as the tensor cores read it. One warp.
  __device__ void refresh(int j) const {
    float mine[kParts];
    load_lane_row(mine, work.v + j * kDim);
    const float norm = lane_norm(mine), inverse = 1.0f / norm;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const float x = mine[k] * inverse;
      const T high = narrow<T>(x);
      const int at = j * Shared::kPitch + lane_id() + k * kWarp;
      work.high[at] = high;
      work.low[at] = narrow<T>(x - widen(high));
    }
    if (lane_id() == 0) work.slot_norm[j] = norm;
  }

  __device__ int count_of(int64_t i) const { return i < view.span.chunks ? lists.summary_count[view.span.row0 + i] : 0; }
  // The sources of the rows that this thread copies, read a chunk ahead of the copy.
  __device__ void read_sources(int64_t i) {
#pragma unroll
    for (int u = 0; u < kCopies; ++u) {
      const int row = static_cast<int>(threadIdx.x + u * kThreads) / kPackets;
      source_[u] = next_source_[u];
      next_source_[u] =
          i < view.span.chunks && row < lists.tokens ? lists.summary_source[(view.span.row0 + i) * lists.tokens + row] : -1;
    }
  }
  // copy(row, source, at): packet at element `at` of a candidate's row.
  template <class Copy>
  __device__ void fetch_rows(const int (&source)[kCopies], Copy copy) const {
#pragma unroll
    for (int u = 0; u < kCopies; ++u) {
      const int item = static_cast<int>(threadIdx.x) + u * kThreads;
      if (source[u] >= 0) copy(item / kPackets, source[u], item % kPackets * kPacket);
    }
  }
  __device__ void fetch_keys() const {
    fetch_rows(source_, [&](int row, int source, int at) {
      ampere::copy_packet(work.key + row * kDim + at, view.bank_key(source, head) + at, true);
    });
    ampere::commit_copies();
  }
  __device__ void fetch_values(int64_t i, const int (&sources)[kCopies]) const {
    const int buffer = static_cast<int>(i & 1);
    fetch_rows(sources, [&](int row, int source, int at) {
      ampere::copy_packet(work.value + (buffer * kSummaryRows + row) * Shared::kPitch + at, view.value(source, head) + at, true);
    });
    if (const int list = static_cast<int>(threadIdx.x) / 16, at = threadIdx.x % 16 * 4;
        list < 3 && at < lists.tokens && i < view.span.chunks) {
      const int64_t row = view.span.row0 + i;
      const void* from = list == 0   ? static_cast<const void*>(lists.summary_gate + row * lists.tokens + at)
                         : list == 1 ? static_cast<const void*>(lists.summary_norm + (row * heads + head) * lists.tokens + at)
                                     : static_cast<const void*>(lists.summary_offset + row * lists.tokens + at);
      void* to = list == 0   ? static_cast<void*>(work.gate)
                 : list == 1 ? static_cast<void*>(work.norm)
                             : static_cast<void*>(work.offset);
      ampere::copy_packet(static_cast<float*>(to) + buffer * kSummaryRows + at, from, true);
    }
    ampere::commit_copies();
  }

  // Candidate c's scores are summed by one block: that of batch c / 8.
  __device__ int owner(int c) const { return c / kTileRows % heads; }
  __device__ int owned_row(int c) const { return c / kTileRows / heads * kTileRows + c % kTileRows; }
  __device__ int owned_count(int count) const {
    int rows = 0;
    for (int first = head * kTileRows; first < count; first += heads * kTileRows) rows += min(kTileRows, count - first);
    return rows;
  }
  // The candidate of this block's r-th row.
  __device__ int candidate_of_row(int r) const { return (r / kTileRows * heads + head) * kTileRows + r % kTileRows; }
  __device__ float* sent(int from, int row) const { return work.cosine + (from * owned + row) * 2 * kSummaryRows; }
  __device__ float head_mean(int row, int column) const {
    float total = 0.0f;
#pragma unroll 8
    for (int h = 0; h < heads; ++h) total = add_rn(total, sent(h, row)[column]);
    return div_rn(total, static_cast<float>(heads));
  }
  __device__ void expect(uint64_t* barrier, int bytes) const {
    if (threadIdx.x == 0) hopper::arrive_expect(barrier, bytes);
  }

  // Slot of every candidate, to work.slot; its writes are visible after the next barrier.
  __device__ void choose(int buffer, int count, int free) {
    int open = count;
    if (free == 0) {
      approximate(buffer, count);
      if (const int rows = owned_count(count); rows > 0) {
        expect(scored, heads * rows * slots * static_cast<int>(sizeof(float)));
        wait_cluster(scored, scored_parity_);
        scored_parity_ ^= 1;
        for (int r = warp_id(); r < owned; r += warp_count()) {
          if (candidate_of_row(r) < count) settle(r);
        }
      }
      expect(decided, count * static_cast<int>(sizeof(int)));
      wait_cluster(decided, decided_parity_);
      decided_parity_ ^= 1;
      // Every warp finds the open ones; the lists are the same.
      open = 0;
      for (int base = 0; base < count; base += kWarp) {
        const int c = base + lane_id();
        const int choice = c < count ? work.choice[c] : 0;
        const unsigned mask = __ballot_sync(kAllLanes, choice < 0);
        if (warp_id() == 0) {
          if (c < count) work.slot[c] = choice;
          if (choice < 0) work.open[open + __popc(mask & ((1u << lane_id()) - 1))] = c;
        }
        open += __popc(mask);
      }
      if (open == 0) return;
    } else {
      for (int c = threadIdx.x; c < count; c += blockDim.x) work.open[c] = c;
    }
    __syncthreads();
    compare(buffer, open, free > 0);
    const int words = 2 * open + (free > 0 ? open * kSummaryRows : 0);
    if (const int rows = owned_count(open); rows > 0) {
      expect(scored, heads * (rows * (slots + (free > 0 ? kSummaryRows : 0))) * static_cast<int>(sizeof(float)));
      wait_cluster(scored, scored_parity_);
      scored_parity_ ^= 1;
      for (int r = warp_id(); r < owned; r += warp_count()) {
        if (candidate_of_row(r) < open) find_best(r, free > 0);
      }
    }
    expect(decided, words * static_cast<int>(sizeof(int)));
    wait_cluster(decided, decided_parity_);
    decided_parity_ ^= 1;
    if (free > 0) {
      if (warp_id() == 0) claim(count);
    } else {
      for (int c = threadIdx.x; c < open; c += blockDim.x) work.slot[work.open[c]] = __float_as_int(work.best[c].x);
    }
  }

  // Cosines of all candidates and slots by the tensor cores. A warp has 16 candidates and 16 slots.
  __device__ void approximate(int buffer, int count) const {
    const int g = lane_id() / 4, t = lane_id() % 4, row0 = warp_id() / 4 * 16, column0 = warp_id() % 4 * 16;
    if (row0 >= count || column0 >= slots) return;
    const T* value = work.value + buffer * kSummaryRows * Shared::kPitch;
    float d[2][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      // Which 16 elements meet in a step is all one, so a lane takes four neighbours.
      const auto words = [&](const T* rows, int row) {
        return *reinterpret_cast<const uint2*>(rows + row * Shared::kPitch + step * 16 + t * 4);
      };
      const uint2 upper = words(value, row0 + g), lower = words(value, row0 + g + 8);
      const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint2 high = words(work.high, column0 + u * 8 + g), low = words(work.low, column0 + u * 8 + g);
        ampere::multiply<T>(d[u], a, high.x, high.y);
        ampere::multiply<T>(d[u], a, low.x, low.y);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = row0 + half * 8 + g;
      if (c >= count) continue;
      const float inverse = 1.0f / work.norm[buffer * kSummaryRows + c];
      const uint32_t to = remote_address(sent(head, owned_row(c)), owner(c)), barrier = remote_address(scored, owner(c));
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int j = column0 + u * 8 + 2 * t;
        if (j + 1 < slots) {
          send(to + j * sizeof(float), d[u][2 * half] * inverse, d[u][2 * half + 1] * inverse, barrier);
        } else if (j < slots) {
          send(to + j * sizeof(float), d[u][2 * half] * inverse, barrier);
        }
      }
    }
  }

  // Tells all blocks the slot of this block's r-th candidate if rounding cannot change it, else -1. One warp.
  __device__ void settle(int r) const {
    const float below = -CUDART_INF_F;
    const bool second = lane_id() + kWarp < slots;
    const float a = lane_id() < slots ? head_mean(r, lane_id()) : below, b = second ? head_mean(r, lane_id() + kWarp) : below;
    const float top = warp_max(fmaxf(a, b));
    const unsigned near_a = __ballot_sync(kAllLanes, lane_id() < slots && !(a < top - kMargin));
    const unsigned near_b = __ballot_sync(kAllLanes, second && !(b < top - kMargin));
    const bool sure = __popc(near_a) + __popc(near_b) == 1 && fabsf(top) <= 2.0f;
    const int choice = !sure ? -1 : near_a ? __ffs(near_a) - 1 : kWarp + __ffs(near_b) - 1;
    if (lane_id() < heads) {
      send(remote_address(work.choice + candidate_of_row(r), lane_id()), static_cast<uint32_t>(choice),
           remote_address(decided, lane_id()));
    }
  }

  // Cosines in fixed order of the open candidates and all slots, and of the candidates with each other if some may claim a slot.
  __device__ void compare(int buffer, int open, bool claims) const {
    const T* value = work.value + buffer * kSummaryRows * Shared::kPitch;
    const float* norm = work.norm + buffer * kSummaryRows;
    const int slot_groups = (slots + kTileColumns - 1) / kTileColumns;
    const int groups = slot_groups + (claims ? kSummaryRows / kTileColumns : 0);
    const auto candidate = [&](int c) { return work.open[min(c, open - 1)]; };
#pragma unroll 1
    for (int group = warp_id(); group < groups; group += warp_count()) {
      const bool of_slots = group < slot_groups;
      const int column = (of_slots ? group : group - slot_groups) * kTileColumns;
      float columns[kTileColumns][kParts];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        if (of_slots) {
          load_lane_row(columns[j], work.v + min(column + j, slots - 1) * kDim);
        } else {
          load_lane_row(columns[j], value + candidate(column + j) * Shared::kPitch);
        }
      }
      const int i = lane_id() / kTileColumns, j = column + lane_id() % kTileColumns;
      const float column_norm = of_slots ? work.slot_norm[min(j, slots - 1)] : norm[candidate(j)];
#pragma unroll 1
      for (int batch = 0; batch * kTileRows < open; ++batch) {
        const int c = batch * kTileRows + i;
        const float dot = tile_dots<false>(columns, [&](float(&to)[kParts], int r) {
          load_lane_row(to, value + candidate(batch * kTileRows + r) * Shared::kPitch);
        });
        const float cosine = div_rn(dot, mul_rn(norm[candidate(c)], column_norm));
        if (c >= open || (of_slots && j >= slots)) continue;
        send(remote_address(sent(head, owned_row(c)) + (of_slots ? j : kSummaryRows + j), owner(c)), cosine,
             remote_address(scored, owner(c)));
      }
    }
  }

  // Tells all blocks the best slot of this block's r-th open candidate, with the score, and how it compares with the others.
  __device__ void find_best(int r, bool claims) const {
    const int c = candidate_of_row(r);
    uint32_t key[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int j = lane_id() + u * kWarp;
      key[u] = j < slots && work.mass[j] > 0.0f ? score_key(head_mean(r, j)) : 0;
    }
    const uint32_t top = __reduce_max_sync(kAllLanes, max(key[0], key[1]));
    const unsigned first = __ballot_sync(kAllLanes, key[0] == top), second = __ballot_sync(kAllLanes, key[1] == top);
    const int slot = top == 0 ? -1 : first ? __ffs(first) - 1 : kWarp + __ffs(second) - 1;
    if (lane_id() < heads) {
      send(remote_address(work.best + c, lane_id()), __int_as_float(slot), key_score(top), remote_address(decided, lane_id()));
    }
    if (!claims) return;
    const float a = head_mean(r, kSummaryRows + 2 * lane_id()), b = head_mean(r, kSummaryRows + 2 * lane_id() + 1);
    for (int block = 0; block < heads; ++block) {
      send(remote_address(work.gram + c * kSummaryRows + 2 * lane_id(), block), a, b, remote_address(decided, block));
    }
  }

  // Candidates in order, each of which may claim the lowest free slot. The first that does is known at once; then those after it
  // meet it, and so on: as many steps as there are claims. One warp, two candidates a lane.
  __device__ void claim(int count) const {
    int slot[2];
    float score[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float2 best = work.best[lane_id() + u * kWarp];
      slot[u] = __float_as_int(best.x);
      score[u] = best.y;
    }
    const auto free_mask = [&](int u) {
      const int j = lane_id() + u * kWarp;
      return __ballot_sync(kAllLanes, j < slots && !(work.mass[j] > 0.0f));
    };
    const uint64_t low = free_mask(0), high = free_mask(1);
    uint64_t free = low | high << 32;
    int next = 0;  // the first candidate not yet decided
    while (free != 0) {
      uint64_t spawns = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        const uint64_t mask = __ballot_sync(kAllLanes, c >= next && c < count && (slot[u] < 0 || score[u] < tau_spawn));
        spawns |= mask << (u * kWarp);
      }
      if (spawns == 0) break;
      const int founder = __ffsll(spawns) - 1, claimed = __ffsll(free) - 1;
      free &= free - 1;
      next = founder + 1;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        if (c == founder) slot[u] = claimed;
        if (c <= founder || c >= count) continue;
        const float here = work.gram[c * kSummaryRows + founder];
        if (slot[u] < 0 || here > score[u] || (here == score[u] && claimed < slot[u])) {
          slot[u] = claimed;
          score[u] = here;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int c = lane_id() + u * kWarp;
      if (c < count) work.slot[c] = slot[u];
    }
  }

  // Prototypes move towards the means of what they were given. A warp has every 16th slot.
  __device__ void update(int buffer, int count) const {
    const int mine[2] = {lane_id() < count ? work.slot[lane_id()] : -1,
                         lane_id() + kWarp < count ? work.slot[lane_id() + kWarp] : -1};
    const float stay = sigmoid(-static_cast<const float*>(p.eta_logit)[head]);
    const float* gate = work.gate + buffer * kSummaryRows;
    const T* value = work.value + buffer * kSummaryRows * Shared::kPitch;
    for (int j = warp_id(); j < slots; j += warp_count()) {
      const uint64_t high = __ballot_sync(kAllLanes, mine[1] == j);
      const uint64_t members = __ballot_sync(kAllLanes, mine[0] == j) | high << 32;
      if (members == 0) continue;
      const float before = work.mass[j];
      const bool used = before > 0.0f;
      float mass = 0.0f, mean_k[kParts] = {}, mean_v[kParts] = {};
      for (uint64_t left = members; left != 0; left &= left - 1) {
        const int c = __ffsll(left) - 1;
        const float weight = gate[c];
        mass += weight;
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          const int d = lane_id() + k * kWarp;
          mean_k[k] += weight * widen(work.key[c * kDim + d]);
          mean_v[k] += weight * widen(value[c * Shared::kPitch + d]);
        }
      }
      const float rate = used ? 1.0f - pow(stay, mass) : 1.0f, share = 1.0f / mass;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        float &old_k = work.k[j * kDim + lane_id() + k * kWarp], &old_v = work.v[j * kDim + lane_id() + k * kWarp];
        const float new_k = mean_k[k] * share, new_v = mean_v[k] / mass;
        old_k = used ? old_k + rate * (new_k - old_k) : new_k;
        old_v = used ? old_v + rate * (new_v - old_v) : new_v;
      }
      __syncwarp();
      if (lane_id() == 0) work.mass[j] = used ? before + mass : mass;
      refresh(j);
    }
  }

  // The bank to row `row` of these; visible to the copy engine already.
  __device__ void write(void* k, void* v, void* mass, int64_t row) const {
    if (threadIdx.x == 0) {
      const int64_t at = view.summary_row(row, head, 0);
      const uint32_t bytes = static_cast<uint32_t>(slots * kDim * sizeof(float));
      store_bytes(static_cast<float*>(k) + at, work.k, bytes);
      store_bytes(static_cast<float*>(v) + at, work.v, bytes);
      commit_stores();
    }
    if (head == 0 && threadIdx.x < slots) static_cast<float*>(mass)[row * slots + threadIdx.x] = work.mass[threadIdx.x];
  }
  __device__ void write_snapshot(int64_t i) const { write(p.summary_k, p.summary_v, p.summary_mass, view.span.row0 + i); }

  const BankScan& p;
  const ScanView<T> view;
  Carver carver_;
  Shared& work;
  const CandidateLists lists;
  uint64_t *scored, *decided;  // barriers: cosines of the candidates of this block, and what was decided about all
  const int head, heads, slots, owned;
  const float tau_spawn;
  uint32_t scored_parity_ = 0, decided_parity_ = 0;
  int source_[kCopies] = {}, next_source_[kCopies] = {};  // of this chunk and the next
};

}  // namespace coda::kernels::sm90
