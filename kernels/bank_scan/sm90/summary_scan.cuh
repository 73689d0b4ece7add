#pragma once

#include "../../common/mma.cuh"
#include "candidates.cuh"
#include "cluster.cuh"
#include "routing.cuh"

namespace coda::kernels::sm90 {

constexpr int kSummaryRows = 64;  // the most slots, and the most tokens of a chunk
// More than twice the most by which the mean cosine of the tensor cores can differ from that in fixed order. Slots come as sums
// of two 16-bit numbers, off by 2^-18 of their norm, candidates as they are; of the 2 D / 16 accumulations, D 128, each of 17 addends,
// none is off by more than 17 units in the last place, 2^-23, even where the tensor cores cut every addend: 2^-14.8 together.
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
  uint32_t gram[kSummaryRows * kSummaryRows];  // keys of the mean cosines of candidates
  Match best[kSummaryRows];                    // in fixed order
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

// One block of a cluster that walks the chunks of one sequence.
template <class T, int kParts>
class SummaryScan {
 public:
  __device__ SummaryScan(const BankScan& params, int64_t n, unsigned char* shared, uint64_t* barriers)
      : p(params), view(params, n), carver_(params.workspace), work(*reinterpret_cast<Shared*>(shared)),
        lists(carver_, params, params.banks), scored(barriers), decided(barriers + 1), fetched(barriers + 2),
        fetched_keys(barriers + 4), head(cluster_rank()), heads(params.kv_heads), slots(params.summary_slots),
        chunks(static_cast<int>(view.span.chunks)), owned(Shared::owned(params.kv_heads)),
        spawning(score_key(float_threshold(params.tau_spawn))), reciprocal(1.0f / static_cast<float>(params.kv_heads)),
        stay(sigmoid(-static_cast<const float*>(params.eta_logit)[head])) {}

  __device__ void run() {
    const Span& span = view.span;
    if (threadIdx.x == 0) {
      for (auto* barrier : {scored, decided, fetched, fetched + 1, fetched_keys}) hopper::init_barrier(barrier, 1);
      hopper::fence_barrier_init();
    }
    cluster_arrive();
    load_state();
    __syncthreads();
    refresh();
    int i = 0;
    for (; i < chunks && !view.evicts(span.chunk_start(i, p.chunk)); ++i) {
      hopper::fence_async_proxy();
      __syncthreads();
      write_snapshot(i);
    }
    int count = count_of(i), next_count = count_of(i + 1), free = 1, buffer = 0;
    CandidateRows rows = rows_of(i), next_rows = rows_of(i + 1);
    fetch_values(i, 0, rows, count);
    uint32_t parity = 0, keys_parity = 0;
    __syncthreads();
    cluster_wait();
#pragma unroll 1
    for (; i < chunks; ++i) {
      fetch_keys(rows, count);
      fetch_values(i + 1, buffer ^ 1, next_rows, next_count);
      const int later_count = count_of(i + 2);
      rows = next_rows;
      next_rows = rows_of(i + 2);
      // A slot once in use stays so.
      if (free > 0) free = __syncthreads_count(threadIdx.x < slots && !(work.mass[threadIdx.x] > 0.0f));
      hopper::wait(fetched + buffer, parity);
      if (count > 0) choose(buffer, count, free);
      if (threadIdx.x == 0) hopper::wait_stores_read();
      __syncthreads();
      if (count > 0) {
        hopper::wait(fetched_keys, keys_parity);
        keys_parity ^= 1;
        update(buffer, count);
        const int64_t row = span.row0 + i;
        if (head == 0 && threadIdx.x < count) {
          p.assignment[row * p.chunk + work.offset[buffer * kSummaryRows + threadIdx.x]] = work.slot[threadIdx.x];
        }
      }
      hopper::fence_async_proxy();
      __syncthreads();
      write_snapshot(i);
      parity ^= buffer;
      buffer ^= 1;
      count = next_count;
      next_count = later_count;
    }
    hopper::fence_async_proxy();
    __syncthreads();
    write(p.new_summary_k, p.new_summary_v, p.new_summary_mass, view.n);
    if (threadIdx.x == 0) hopper::wait_stores();
  }

 private:
  static constexpr int kDim = kParts * kWarp;
  using Shared = SummaryShared<T, kDim>;
  static constexpr uint32_t kRowBytes = kDim * sizeof(T);
  static constexpr int kWarps = 16, kWarpSlots = kSummaryRows / kWarps;  // a warp has 4 neighbouring slots, and fetches 4 rows

  __device__ void load_state() {
    const float* mass = static_cast<const float*>(p.state_summary_mass) + view.n * slots;
    const float* k = static_cast<const float*>(p.state_summary_k) + view.summary_row(view.n, head, 0);
    const float* v = static_cast<const float*>(p.state_summary_v) + view.summary_row(view.n, head, 0);
    for (int item = threadIdx.x; item < slots * kDim; item += blockDim.x) {
      const bool read = chunks == 0 || mass[item / kDim] > 0.0f;
      work.k[item] = read ? k[item] : 0.0f;
      work.v[item] = read ? v[item] : 0.0f;
    }
    for (int j = threadIdx.x; j < slots; j += blockDim.x) work.mass[j] = mass[j];
  }
  // Eight lanes have one slot of the warp; each has 8 neighbouring elements of every 64.
  static constexpr int kPieces = kDim / 64;
  static __device__ int slot_of_lane() { return warp_id() * kWarpSlots + lane_id() / 8; }
  static __device__ int element(int piece) { return piece * 64 + lane_id() % 8 * kPacket; }

  // The norms of this warp's slots, and their values as the tensor cores read them.
  __device__ void refresh() const {
    const int first = warp_id() * kWarpSlots;
    float rows[kWarpSlots][kParts];
#pragma unroll
    for (int j = 0; j < kWarpSlots; ++j) load_lane_row(rows[j], work.v + (first + j) * kDim);
    const float norm = column_norm(rows), scale = __shfl_sync(kAllLanes, __fdividef(1.0f, norm), lane_id() / 8);
    if (lane_id() < kWarpSlots) work.slot_norm[first + lane_id()] = norm;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const auto* v = reinterpret_cast<const float2*>(work.v + slot_of_lane() * kDim + element(piece));
      uint32_t high[4], low[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 x = v[w];
        high[w] = pack<T>(x.x * scale, x.y * scale);
        const float2 taken = unpack<T>(high[w]);
        low[w] = pack<T>(x.x * scale - taken.x, x.y * scale - taken.y);
      }
      const int at = slot_of_lane() * Shared::kPitch + element(piece);
      *reinterpret_cast<uint4*>(work.high + at) = {high[0], high[1], high[2], high[3]};
      *reinterpret_cast<uint4*>(work.low + at) = {low[0], low[1], low[2], low[3]};
    }
  }

  __device__ int count_of(int i) const { return i < chunks ? lists.summary_count[view.span.row0 + i] : 0; }
  // Of the candidate that this lane fetches, of lanes 0 to 3. Read a chunk ahead of the copy.
  __device__ int fetched_row() const { return warp_id() * kWarpSlots + lane_id(); }
  __device__ CandidateRows rows_of(int i) const {
    if (i >= chunks || lane_id() >= kWarpSlots || fetched_row() >= lists.tokens) return {};
    return lists.summary_rows[((view.span.row0 + i) * heads + head) * lists.tokens + fetched_row()];
  }
  __device__ void fetch_keys(const CandidateRows& rows, int count) const {
    if (threadIdx.x == 0 && count > 0) hopper::arrive_expect(fetched_keys, count * kRowBytes);
    if (rows.key != nullptr) hopper::load_bytes(work.key + fetched_row() * kDim, rows.key, fetched_keys, kRowBytes);
  }
  __device__ void fetch_values(int i, int buffer, const CandidateRows& rows, int count) const {
    if (i >= chunks) return;
    const uint32_t list_bytes = lists.tokens * sizeof(float);
    uint64_t* barrier = fetched + buffer;
    if (threadIdx.x == 0) hopper::arrive_expect(barrier, count * kRowBytes + 3 * list_bytes);
    if (rows.value != nullptr) {
      hopper::load_bytes(work.value + (buffer * kSummaryRows + fetched_row()) * Shared::kPitch, rows.value, barrier, kRowBytes);
    }
    const int64_t row = view.span.row0 + i;
    if (threadIdx.x == kWarp) {
      hopper::load_bytes(work.gate + buffer * kSummaryRows, lists.summary_gate + row * lists.tokens, barrier, list_bytes);
      hopper::load_bytes(work.norm + buffer * kSummaryRows, lists.summary_norm + (row * heads + head) * lists.tokens, barrier,
                         list_bytes);
      hopper::load_bytes(work.offset + buffer * kSummaryRows, lists.summary_offset + row * lists.tokens, barrier, list_bytes);
    }
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
  __device__ float mean_of(int row, int column) const {
    return head_mean(sent(0, row) + column, owned * 2 * kSummaryRows, heads, reciprocal);
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
        hopper::wait(scored, scored_parity_);
        scored_parity_ ^= 1;
        for (int r = warp_id(); r < owned; r += warp_count()) {
          if (candidate_of_row(r) < count) settle(r);
        }
      }
      expect(decided, count * static_cast<int>(sizeof(int)));
      hopper::wait(decided, decided_parity_);
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
      hopper::wait(scored, scored_parity_);
      scored_parity_ ^= 1;
      for (int r = warp_id(); r < owned; r += warp_count()) {
        if (candidate_of_row(r) < open) find_best(r, free > 0);
      }
    }
    expect(decided, words * static_cast<int>(sizeof(int)));
    hopper::wait(decided, decided_parity_);
    decided_parity_ ^= 1;
    if (free > 0) {
      if (warp_id() == 0) claim(count);
    } else {
      for (int c = threadIdx.x; c < open; c += blockDim.x) work.slot[work.open[c]] = work.best[c].slot;
    }
  }

  // Cosines of all candidates and slots by the tensor cores. A warp has 16 candidates and 16 slots.
  __device__ void approximate(int buffer, int count) const {
    const int g = lane_id() / 4, t = lane_id() % 4, row0 = warp_id() / 4 * 16, column0 = warp_id() % 4 * 16;
    if (row0 >= count || column0 >= slots) return;
    const T* value = work.value + buffer * kSummaryRows * Shared::kPitch;
    float d[2][4] = {};
#pragma unroll 2
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
      const float inverse = __fdividef(1.0f, work.norm[buffer * kSummaryRows + c]);
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
    const float a = lane_id() < slots ? mean_of(r, lane_id()) : below, b = second ? mean_of(r, lane_id() + kWarp) : below;
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

  // Tells all blocks the best slot of this block's r-th open candidate, and how it compares with the others.
  __device__ void find_best(int r, bool claims) const {
    const int c = candidate_of_row(r);
    const Match best = best_match(slots, [&](int j) { return work.mass[j] > 0.0f ? score_key(mean_of(r, j)) : 0; });
    if (lane_id() < heads) {
      send(remote_address(work.best + c, lane_id()), best.key, static_cast<uint32_t>(best.slot),
           remote_address(decided, lane_id()));
    }
    if (!claims) return;
    const uint32_t a = score_key(mean_of(r, kSummaryRows + 2 * lane_id()));
    const uint32_t b = score_key(mean_of(r, kSummaryRows + 2 * lane_id() + 1));
#pragma unroll 1
    for (int block = 0; block < heads; ++block) {
      send(remote_address(work.gram + c * kSummaryRows + 2 * lane_id(), block), a, b, remote_address(decided, block));
    }
  }

  // Candidates in order, each of which may claim the lowest free slot. The first that does is known at once; then those after it
  // meet it, and so on: as many steps as there are claims. One warp, two candidates a lane.
  __device__ void claim(int count) const {
    Match match[2] = {work.best[lane_id()], work.best[lane_id() + kWarp]};
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
        const bool spawns_here = match[u].key < spawning && match[u].key != kNanKey;
        const uint64_t mask = __ballot_sync(kAllLanes, c >= next && c < count && spawns_here);
        spawns |= mask << (u * kWarp);
      }
      if (spawns == 0) break;
      const int founder = __ffsll(spawns) - 1, claimed = __ffsll(free) - 1;
      free &= free - 1;
      next = founder + 1;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        if (c == founder) match[u].slot = claimed;
        if (c <= founder || c >= count) continue;
        const uint32_t here = work.gram[c * kSummaryRows + founder];
        if (here > match[u].key || (here == match[u].key && claimed < match[u].slot)) match[u] = {here, claimed};
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int c = lane_id() + u * kWarp;
      if (c < count) work.slot[c] = match[u].slot;
    }
  }

  // Prototypes move towards the means of what they were given.
  __device__ void update(int buffer, int count) const {
    const int group = lane_id() / 8, j = slot_of_lane();
    uint64_t members = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = lane_id() + half * kWarp, slot = c < count ? work.slot[c] : -1;
#pragma unroll
      for (int g = 0; g < kWarpSlots; ++g) {
        const uint64_t mask = __ballot_sync(kAllLanes, slot == warp_id() * kWarpSlots + g);
        if (g == group) members |= mask << (half * kWarp);
      }
    }
    if (!__any_sync(kAllLanes, members != 0)) return;
    const float* gate = work.gate + buffer * kSummaryRows;
    const T* value = work.value + buffer * kSummaryRows * Shared::kPitch;
    float mass = 0.0f, mean_k[kPieces][kPacket] = {}, mean_v[kPieces][kPacket] = {};
#pragma unroll 1
    for (uint64_t left = members; left != 0; left &= left - 1) {
      const int c = __ffsll(left) - 1;
      const float weight = gate[c];
      mass += weight;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float k[kPacket], v[kPacket];
        load_packet(k, work.key + c * kDim + element(piece));
        load_packet(v, value + c * Shared::kPitch + element(piece));
#pragma unroll
        for (int e = 0; e < kPacket; ++e) {
          mean_k[piece][e] += weight * k[e];
          mean_v[piece][e] += weight * v[e];
        }
      }
    }
    const float before = work.mass[j];
    __syncwarp();
    if (members != 0) {
      const float share = 1.0f / mass;
      const bool used = before > 0.0f;
      const float rate = used ? 1.0f - pow(stay, mass) : 1.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        auto* k = reinterpret_cast<float4*>(work.k + j * kDim + element(piece));
        auto* v = reinterpret_cast<float4*>(work.v + j * kDim + element(piece));
        const auto move = [&](float& x, float to) { x = used ? x + rate * (to - x) : to; };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float4 x = k[half], y = v[half];
          float *to_k = mean_k[piece] + 4 * half, *to_v = mean_v[piece] + 4 * half;
          move(x.x, to_k[0] * share);
          move(x.y, to_k[1] * share);
          move(x.z, to_k[2] * share);
          move(x.w, to_k[3] * share);
          move(y.x, quotient(to_v[0], mass, share));
          move(y.y, quotient(to_v[1], mass, share));
          move(y.z, quotient(to_v[2], mass, share));
          move(y.w, quotient(to_v[3], mass, share));
          k[half] = x;
          v[half] = y;
        }
      }
      if (lane_id() % 8 == 0) work.mass[j] = used ? before + mass : mass;
    }
    __syncwarp();
    refresh();
  }

  // The bank to row `row` of these; visible to the copy engine already.
  __device__ void write(void* k, void* v, void* mass, int64_t row) const {
    if (threadIdx.x == 0) {
      const int64_t at = view.summary_row(row, head, 0);
      const uint32_t bytes = static_cast<uint32_t>(slots * kDim * sizeof(float));
      hopper::store_bytes(static_cast<float*>(k) + at, work.k, bytes);
      hopper::store_bytes(static_cast<float*>(v) + at, work.v, bytes);
      hopper::commit_stores();
    }
    if (head == 0 && threadIdx.x < slots) static_cast<float*>(mass)[row * slots + threadIdx.x] = work.mass[threadIdx.x];
  }
  __device__ void write_snapshot(int i) const { write(p.summary_k, p.summary_v, p.summary_mass, view.span.row0 + i); }

  const BankScan& p;
  const ScanView<T> view;
  Carver carver_;
  Shared& work;
  const CandidateLists lists;
  // Barriers: cosines of the candidates of this block, and what was decided about all; values (2) and keys of candidates.
  uint64_t *scored, *decided, *fetched, *fetched_keys;
  const int head, heads, slots, chunks, owned;
  const uint32_t spawning;  // key of the least score that does not spawn
  const float reciprocal;   // of the number of heads
  const float stay;         // 1 - eta
  uint32_t scored_parity_ = 0, decided_parity_ = 0;
};

}  // namespace coda::kernels::sm90
