#pragma once

#include "../../common/mma.cuh"
#include "../../common/wgmma.cuh"
#include "../summary.cuh"
#include "cluster.cuh"
#include "summary_moves.cuh"
#include "summary_shared.cuh"

namespace coda::kernels::sm90 {

// More than twice the most by which the mean cosine of the tensor cores can differ from that in fixed order. Slots come as sums
// of two 16-bit numbers, off by 2^-18 of their norm, candidates as they are. Of the D / 16 accumulations of the high parts, 8 for
// D 128, each of 17 addends, none is off by more than 17 units in the last place, 2^-23, even where the tensor cores cut every
// addend, and those of the low parts are less by 2^-8. Norms, quotients and fixed order itself add 2^-18.6: 2.25e-5 together. In
// two sums, each at most the product of the norms of its share of the elements, the accumulations add half as much: 1.45e-5.
constexpr float kMargin(int sums) { return sums == 1 ? 0x1.8p-15f : 0x1p-15f; }

// One block of a cluster that walks the chunks of one sequence. Half a warp keeps a slot's values in registers. What others wait
// for, values and who goes where, comes first; snapshots follow while scores travel, and keys in a kernel of their own.
template <class T, int kParts, int kBlocks>
class SummaryScan {
 public:
  static constexpr int kBarriers = 3;

  __device__ SummaryScan(const BankScan& params, int64_t n, unsigned char* shared, uint64_t* barriers)
      : p(params), view(params, n), work(*reinterpret_cast<Shared*>(shared)), scored(barriers), decided(barriers + 1),
        met(barriers + 2), rank(static_cast<int>(uniform(cluster_rank()))), head(rank / kBlocks), part(rank % kBlocks),
        heads(params.kv_heads), slots(params.summary_slots), first(part * kSlots + warp_id() * kWarpSlots),
        chunks(static_cast<int>(view.span.chunks)), owned(Shared::owned(params.kv_heads, kBlocks)),
        log_stay(log2f(sigmoid(-static_cast<const float*>(params.eta_logit)[head]))) {}

  __device__ void run() {
    const Span& span = view.span;
    if (threadIdx.x == 0) {
      for (auto* barrier : {scored, decided, met}) hopper::init_barrier(barrier, 1);
      hopper::fence_barrier_init();
    }
    cluster_arrive();
    // Of the batch of candidates whose scores this lane knows where to send.
    const int batch = warp_id() % 4 * 16 + lane_id() % kWarpBatches * kBatch;
    batch_to_ = remote_address(near(head, (warp_id() / 4 + part) % 2) + owned_row(batch) * kGroupSlots, owner(batch));
    batch_scored_ = remote_address(scored, owner(batch));
    batch_own_ = owner(batch) == rank;
    Slots bank;
    load_state(bank);
    int i = 0;
    for (; i < chunks && !view.evicts(span.chunk_start(i, p.chunk)); ++i) write_values(p.summary_v, span.row0 + i, bank);
    ListGate<kSplits> lists{i};
    const auto await_list = [&](int chunk) {
      lists.await(chunk, chunks, [&] { return p.lists.summary_ready + view.span.row0 * kSplits; });
    };
    await_list(i + 2);
    int count = count_of(i), next_count = count_of(i + 1), free = 1;
    int values = 0, list = 0;  // buffers of this chunk
    const auto list_at = [&](int ahead) -> CandidateList& { return work.list[(list + ahead) % Shared::kLists]; };
    const auto values_at = [&](int ahead) { return work.value[(values + ahead) % 3]; };
    for (int ahead = 0; ahead < 3; ++ahead) fetch_list(i + ahead, list_at(ahead));
    await_copies();
    sync();
    for (int ahead = 0; ahead < 2; ++ahead) {
      if (i + ahead < chunks) fetch(list_at(ahead), values_at(ahead));
    }
    await_copies();
    sync();
    Choice choice{-1, -1};
    Members members[kPairs];
    const int began = i;
    members_to_ = p.lists.members + (span.row0 + i) * slots + slot_of(0);
    cluster_wait();
#pragma unroll 1
    for (; i < chunks; ++i) {
      if (free > 0) {
        free = free_slots();  // a slot once in use stays so
        if (free == 0) sync();
      }
      CandidateList& here = list_at(0);
      const bool scoring = count > 0 && free < slots;
      if (warp_id() == kWarps - 1) {  // that has nothing to multiply
        if (i > began) copy_values(span.row0 + i - 1);
        if (scoring && owned_count(count) > 0) {
          const int batches = (owned_count(count) + kBatch - 1) / kBatch;
          expect(scored, heads * (kSummaryRows / kGroupSlots) * batches * kBatchBytes, lane_id() == 0);
        }
      }
      if (scoring) approximate(values_at(0), here.norm, count);
      // While the scores travel: what was decided of the last chunk, and what the next ones need.
      if (i > began) tell(span.row0 + i - 1, members, choice);
      if (warp_id() == kWarps - 1) {
        hopper::wait_stores_read();  // before others, told what was decided, give slots new values
        if (scoring) expect(decided, count * static_cast<int>(sizeof(int)), lane_id() == 0);
      }
      if (i + 2 < chunks) fetch(list_at(2), values_at(2));
      if (fetches_lists()) await_list(i + 3);
      fetch_list(i + 3, list_at(3));
      const int later_count = count_of(i + 2);
      if (scoring) settle_owned(count, free > 0);
      choice = {-1, -1};
      bool settled = count == 0;
      if (scoring) {
        if (rank * kBatch < count) scored_parity_ ^= 1;
        hopper::wait(decided, decided_parity_);
        decided_parity_ ^= 1;
        settled = read_choice(choice, count);
        if (free > 0) sync();  // which slots are in use has been read
      }
      if (!settled) choose(choice, bank, values_at(0), here.norm, count, free);
      move_values(bank, members, choice, values_at(0), here);
      if (free > 0) mark_used(choice);
      await_copies();
      sync();
      values = values == 2 ? 0 : values + 1;
      list = list == Shared::kLists - 1 ? 0 : list + 1;
      count = next_count;
      next_count = later_count;
    }
    if (chunks > began) {
      tell(span.row0 + chunks - 1, members, choice);
      write_values(p.summary_v, span.row0 + chunks - 1, bank);
    }
    write_values(p.new_summary_v, view.n, bank);
    if (warp_id() == kWarps - 1) hopper::wait_stores();
  }

 private:
  static constexpr int kDim = kParts * kWarp;
  using Shared = SummaryShared<T, kDim>;
  static constexpr int kPanelElements = Shared::kPanelBytes / static_cast<int>(sizeof(T));
  static constexpr int kWarpSlots = kSummaryRows / kBlocks / (kScanThreads / kWarp);  // neighbouring slots that a warp keeps
  // Of one block: its slots, its warps, and how many neighbouring candidates' scores it sums.
  static constexpr int kSlots = kSummaryRows / kBlocks, kWarps = kScanThreads / kWarp, kBatch = kTileRows / kBlocks,
                       kBatchBytes = kBatch * kGroupSlots * static_cast<int>(sizeof(float)),
                       kWarpBatches = 16 / kBatch;  // whose scores a warp has
  // Warps that neither multiply nor settle first fetch for all. Packets of 16 bytes of a row, rows of a warp, and of one of its
  // loads.
  static constexpr int kFetchers = kWarps / 2, kRowPackets = kDim / kPacket, kFetchedRows = kSummaryRows / kFetchers,
                       kLoadRows = kWarp / kRowPackets, kLoads = kFetchedRows / kLoadRows;
  // Of a slot, a lane keeps kGroups times four neighbouring elements, 64 apart.
  static constexpr int kPairs = kWarpSlots / 2, kGroups = kDim / 64, kElements = kGroups * 4;
  __device__ int slot_of(int pair) const { return first + pair * 2 + lane_id() / (kWarp / 2); }
  struct Choice {
    int slot[2];  // of candidates lane and lane + 32, -1 beyond the last
  };
  struct Slots {
    float v[kPairs][kElements], mass[kPairs];
  };
  // What this thread fetched and stored is there, for the tensor cores too.
  static __device__ void await_copies() {
    ampere::commit_copies();
    ampere::wait_copies<0>();
    hopper::fence_async_proxy();
  }
  static __device__ void sync() { hopper::sync_threads(1, kWarps * kWarp); }
  __device__ bool holds(int slot) const { return slot / kSlots == part; }

  __device__ void load_state(Slots& bank) const {
    const float* mass = static_cast<const float*>(p.state_summary_mass) + view.n * slots;
    for (int j = threadIdx.x; j < slots; j += kWarps * kWarp) work.mass[j] = mass[j];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int slot = slot_of(pair);
      bank.mass[pair] = slot < slots ? mass[slot] : 0.0f;
      const bool read = slot < slots && (chunks == 0 || bank.mass[pair] > 0.0f);
      const int64_t at = view.summary_row(view.n, head, slot) + half_lane() * 4;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        bank.v[pair][e] = read ? static_cast<const float*>(p.state_summary_v)[at + e / 4 * 64 + e % 4] : 0.0f;
      }
      publish(bank, pair);
    }
  }

  // Values in fixed order's reach, and as the tensor cores read them once await_copies has ordered that.
  __device__ void publish(const Slots& bank, int pair) const {
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < kElements; ++e) square += bank.v[pair][e] * bank.v[pair][e];
#pragma unroll
    for (int offset = kWarp / 4; offset > 0; offset /= 2) square += __shfl_xor_sync(kAllLanes, square, offset);
    // What no 16-bit numbers can stand for becomes NaN, and is left to fixed order.
    float scale;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(scale) : "f"(fmaxf(square, 1e-12f)));
    scale = square < CUDART_INF_F ? scale : CUDART_NAN_F;
    const int slot = slot_of(pair), near = slot % kGroupSlots;
    float* const values = work.v + slot * kDim + half_lane() * 4;
    // Slot 8 t + 2 b + e of the 32 is row 8 b + 2 t + e, so that a lane of the products has eight neighbouring slots.
    T* const to = place(work.direction[slot / kGroupSlots], near % 8 / 2 * 8 + near / 8 * 2 + near % 2, half_lane() * 4);
    constexpr int low_rows = kGroupSlots * 64;  // in elements, from a high part to its low part
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float* v = bank.v[pair] + group * 4;
      *reinterpret_cast<float4*>(values + group * 64) = {v[0], v[1], v[2], v[3]};
      float high[4], low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) high[e] = v[e] * scale;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float2 held = unpack<T>(pack<T>(high[e], high[e + 1]));
        low[e] = high[e] - held.x;
        low[e + 1] = high[e + 1] - held.y;
      }
      store_part(to + group * kPanelElements, high);
      store_part(to + group * kPanelElements + low_rows, low);
    }
  }
  // Element d of a row of swizzled panels.
  template <class Element>
  static __device__ Element* place(Element* rows, int row, int d) {
    const int packet = hopper::swizzled(row, d % 64 / kPacket) / static_cast<int>(sizeof(T));
    return rows + d / 64 * kPanelElements + packet + d % kPacket;
  }

  __device__ int count_of(int i) const { return i < chunks ? p.lists.summary_count[view.span.row0 + i] : 0; }

  // The fetchers are numbered from 0; others get a negative number.
  static __device__ int fetcher() {
    constexpr int first_quarter = kBlocks == 2 ? 1 : 2;  // and the last
    const int quarter = warp_id() / 4;
    return quarter == first_quarter ? warp_id() % 4 : quarter == 3 ? 4 + warp_id() % 4 : -1;
  }
  static __device__ int fetched_row() { return fetcher() * kFetchedRows + lane_id() / kRowPackets; }
  static __device__ int fetched_element() { return lane_id() % kRowPackets * kPacket; }
  // Values of candidates. All addresses first, in registers of their own: a copy holds them for long.
  __device__ void fetch(const CandidateList& list, T* value) const {
    if (fetcher() < 0) return;
    const void* from[kLoads];
    const int row = fetched_row(), element = fetched_element(), packet = element % 64 / kPacket ^ row % 8;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      from[load] = static_cast<const T*>(list.rows[row + load * kLoadRows].value) + element;
    }
    value += element / 64 * kPanelElements + row * 64;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int ahead = load * kLoadRows;
      if (row + ahead < p.lists.tokens) {
        ampere::copy_packet(value + ahead * 64 + (packet ^ ahead % 8) * kPacket, from[load], true);
      }
    }
  }
  static __device__ bool fetches_lists() { return fetcher() >= kFetchers / 2; }
  __device__ void fetch_list(int i, CandidateList& list) const {
    if (i >= chunks) return;
    const int64_t row = view.span.row0 + i;
    const auto packet = [&](auto* to, const auto* from, int at) {
      ampere::copy_packet(reinterpret_cast<uint4*>(to) + at, reinterpret_cast<const uint4*>(from) + at, true);
    };
    const int at = lane_id(), words = p.lists.tokens / 4;
    switch (fetcher() - kFetchers / 2) {
      case 0:
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int j = at + u * kWarp;
          if (j < p.lists.tokens) packet(list.rows, p.lists.summary_rows + (row * heads + head) * p.lists.tokens, j);
        }
        break;
      case 1:
        if (at < words) packet(list.gate, p.lists.summary_gate + row * p.lists.tokens, at);
        break;
      case 2:
        if (at < words) packet(list.norm, p.lists.summary_norm + (row * heads + head) * p.lists.tokens, at);
        break;
    }
  }

  // Of the slots of other blocks only this is known.
  __device__ void mark_used(const Choice& choice) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (choice.slot[u] >= 0 && !holds(choice.slot[u])) work.mass[choice.slot[u]] = 1.0f;
    }
  }
  __device__ int free_slots() const {
    const auto is_free = [&](int j) { return j < slots && !(work.mass[j] > 0.0f); };
    return __popc(__ballot_sync(kAllLanes, is_free(lane_id()))) + __popc(__ballot_sync(kAllLanes, is_free(lane_id() + kWarp)));
  }

  // Candidate c's scores are summed by one block, which has whole batches of neighbours.
  __device__ int blocks() const { return heads * kBlocks; }
  // Where there are blocks for all batches, as with 8 heads, nothing is divided.
  __device__ int owner(int c) const {
    const int at = c / kBatch;
    return at < blocks() ? at : at % blocks();
  }
  __device__ int owned_row(int c) const {
    const int at = c / kBatch, row = c % kBatch;
    return at < blocks() ? row : at / blocks() * kBatch + row;
  }
  __device__ int owned_count(int count) const {
    int rows = 0;
    for (int c = rank * kBatch; c < count; c += blocks() * kBatch) rows += min(kBatch, count - c);
    return rows;
  }
  // The candidate of this block's r-th row.
  __device__ int candidate_of_row(int r) const {
    return (r / kBatch * blocks() + rank) * kBatch + r % kBatch;
  }
  __device__ float* sent(int from, int row) const { return work.cosine + (from * owned + row) * 2 * kSummaryRows; }
  __device__ float mean_of(int row, int column) const {
    return head_mean(sent(0, row) + column, owned * 2 * kSummaryRows, heads, 1.0f / static_cast<float>(heads));
  }
  // What the tensor cores say comes by 32 slots, (Hkv, 2, owned, 32), and is put together behind it, (slots / 32, C, 32).
  __device__ float* near(int from, int group) const { return work.cosine + (from * 2 + group) * owned * kGroupSlots; }
  __device__ float* outgoing() const { return work.cosine + heads * owned * kSummaryRows; }
  static __device__ void expect(uint64_t* barrier, int bytes, bool here = threadIdx.x == 0) {
    if (here) hopper::arrive_expect(barrier, bytes);
  }

  // Cosines of all candidates and slots by the tensor cores, 32 slots a warpgroup; sent to the blocks that sum them. Also where
  // there are no slots: so no block can be a chunk ahead of another.
  __device__ void approximate(const T* value, const float* norm, int count) const {
    const int group = warp_id() / 4 + part, g = lane_id() / 4, first_row = warp_id() % 4 * 16;
    if (warp_id() / 4 >= kSlots / kGroupSlots) return;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) inverse[half] = __fdividef(1.0f, norm[first_row + half * 8 + g]);
    constexpr int steps = kDim / 16;
    float d[kBlocks][32];  // steps in turns, where there are registers for that: so less is rounded
    const auto a = hopper::rows_descriptor(value), b = hopper::rows_descriptor(work.direction[group]);
    float* const rows = outgoing() + (warp_id() / 4 * kSummaryRows + first_row) * kGroupSlots;
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      const int at = (step / 4 * Shared::kPanelBytes + step % 4 * 32) / 16;
      hopper::multiply<T, 0, 0>(d[step % kBlocks], a + at, b + at, step >= kBlocks);
    }
    hopper::commit_products();
    const bool sends = lane_id() < kWarpBatches && first_row + lane_id() * kBatch < count;
    const uint32_t away = __ballot_sync(kAllLanes, sends && !batch_own_), own = __ballot_sync(kAllLanes, sends && batch_own_);
    const uint32_t from = uniform(shared_address(rows));
    uint32_t to[kWarpBatches], barrier[kWarpBatches];
#pragma unroll
    for (int i = 0; i < kWarpBatches; ++i) {
      to[i] = uniform(__shfl_sync(kAllLanes, batch_to_, i));
      barrier[i] = uniform(__shfl_sync(kAllLanes, batch_scored_, i));
    }
    hopper::wait_products<0>();
#pragma unroll
    for (auto& part : d) hopper::pin(part);
    const auto product = [&](int at) { return kBlocks == 1 ? d[0][at] : d[0][at] + d[kBlocks - 1][at]; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int four = 0; four < 8; four += 4) {
        float x[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const int at = (four + u) / 2 * 4 + half * 2 + u % 2;
          x[u] = (product(at) + product(at + 16)) * inverse[half];
        }
        *reinterpret_cast<float4*>(rows + (half * 8 + g) * kGroupSlots + lane_id() % 4 * 8 + four) = {x[0], x[1], x[2], x[3]};
      }
    }
    hopper::fence_async_proxy();
    __syncwarp();
    if (hopper::elect_thread()) {
#pragma unroll
      for (int i = 0; i < kWarpBatches; ++i) {
        if ((away >> i & 1) != 0) send_bytes(to[i], from + i * kBatchBytes, kBatchBytes, barrier[i]);
      }
    }
    // This block's own, which a bulk copy must not take.
    if (own == 0) return;
#pragma unroll
    for (int i = 0; i < kWarpBatches; ++i) {
      if ((own >> i & 1) == 0) continue;
      for (int at = lane_id(); at < kBatchBytes / 16; at += kWarp) {
        send(to[i] + at * 16, reinterpret_cast<const uint4*>(rows + i * kBatch * kGroupSlots)[at], barrier[i]);
      }
    }
  }
  // What is told of a candidate: its slot, -1 where it is open, or which two slots alone are left.
  static __device__ int told(int a, int b) { return -2 - (a | b << 8); }
  static __device__ int left(int choice, int which) { return (-2 - choice) >> (8 * which) & 0xff; }

  __device__ void settle_owned(int count, bool claims) {
    // First those warps that had nothing to multiply.
    const int turn = warp_id() ^ kWarps >> 1;
    if (rank * kBatch >= count || turn >= owned) return;
    for (int r = turn; r < owned; r += kWarps) {
      if (candidate_of_row(r) < count) settle(r, claims);
    }
  }

  // Tells all blocks the slot of this block's r-th candidate if rounding cannot change it. While slots are free, it must not
  // claim one either. One warp.
  __device__ void settle(int r, bool claims) const {
    const int c = candidate_of_row(r), j = lane_id() * 2;
    const uint32_t stride = 2 * owned * kGroupSlots * sizeof(float);
    uint32_t from = shared_address(near(0, j / kGroupSlots) + r * kGroupSlots + j % kGroupSlots);
    uint32_t to = remote_address(work.choice + c, lane_id() % blocks()), barrier = remote_address(decided, lane_id() % blocks());
    asm volatile("" : "+r"(from), "+r"(to), "+r"(barrier));  // ahead of the wait
    hopper::wait(scored, scored_parity_);
    float2 score{0.0f, 0.0f};  // in any order
    if (heads == kClusterBlocks) {  // without a branch in between, so that all are read at once
      float2 x[kClusterBlocks];
#pragma unroll
      for (int h = 0; h < kClusterBlocks; ++h) x[h] = load_shared_pair(from + h * stride);
#pragma unroll
      for (int apart = kClusterBlocks / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int h = 0; h < apart; ++h) x[h].x += x[h + apart].x, x[h].y += x[h + apart].y;
      }
      score = x[0];
    } else {
#pragma unroll 1
      for (int h = 0; h < heads; ++h) {
        const float2 x = load_shared_pair(from + h * stride);
        score.x += x.x, score.y += x.y;
      }
    }
    if (j >= slots || (claims && !(work.mass[j] > 0.0f))) score.x = -CUDART_INF_F;
    if (j + 1 >= slots || (claims && !(work.mass[j + 1] > 0.0f))) score.y = -CUDART_INF_F;
    const float margin = kMargin(kBlocks) * static_cast<float>(heads);
    const float top = score_of(__reduce_max_sync(kAllLanes, max(score_key(score.x), score_key(score.y))));
    const unsigned even = __ballot_sync(kAllLanes, !(score.x < top - margin));
    const unsigned odd = __ballot_sync(kAllLanes, !(score.y < top - margin));
    const unsigned all = even | odd;
    const int nearest = __popc(even) + __popc(odd), low = __ffs(all) - 1, high = kWarp - 1 - __clz(all);
    const int lowest = 2 * low + (even >> low & 1 ? 0 : 1);
    int choice = -1;
    if (fabsf(top) <= 2.0f * static_cast<float>(heads)) {
      if (nearest == 1 && (!claims || top > static_cast<float>(p.tau_spawn) * heads + margin)) choice = lowest;
      if (nearest == 2 && !claims && top > margin) choice = told(lowest, 2 * high + (odd >> high & 1));
    }
    if (lane_id() < blocks()) send(to, static_cast<uint32_t>(choice), barrier);
  }
  static __device__ float2 load_shared_pair(uint32_t from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
    return x;
  }

  static __device__ void load_candidate(float (&to)[kParts], const T* value, int c) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) to[k] = widen(*place(value, c, lane_id() + k * kWarp));
  }

  // What was told of every candidate, -1 beyond the last. Whether all are settled.
  __device__ bool read_choice(Choice& choice, int count) const {
    bool open = false;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int c = lane_id() + u * kWarp;
      if (c >= count) continue;
      choice.slot[u] = work.choice[c];
      open |= choice.slot[u] < 0;
    }
    return !__any_sync(kAllLanes, open);
  }

  // Slot of every candidate that is open. Only while slots are free may one claim one, and then all wait for fixed order. All
  // warps.
  __device__ void choose(Choice& choice, Slots& bank, const T* value, const float* norm, int count, int free) {
    int open = 0, rank[2];
    bool pairs = free == 0;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int c = lane_id() + u * kWarp;
      const unsigned mask = __ballot_sync(kAllLanes, c < count && choice.slot[u] < 0);
      rank[u] = open + __popc(mask & ((1u << lane_id()) - 1));
      open += __popc(mask);
      pairs = pairs && !__any_sync(kAllLanes, c < count && choice.slot[u] == -1);
    }
    if (pairs) {
      compare_pairs(choice, rank, value, norm, open);
      return;
    }
    if (free > 0) {
      open = count;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        choice.slot[u] = -1;
        rank[u] = lane_id() + u * kWarp;
      }
    }
    if (warp_id() == 0) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        if (c < count && choice.slot[u] < 0) work.open[rank[u]] = c;
      }
    }
    sync();
    compare(value, norm, open, free < slots, free > 0);
    if (const int rows = owned_count(open); rows > 0) {
      const int columns = (free < slots ? slots : 0) + (free > 0 ? kSummaryRows : 0);
      expect(scored, heads * rows * columns * static_cast<int>(sizeof(float)));
      hopper::wait(scored, scored_parity_);
      scored_parity_ ^= 1;
      for (int r = warp_id(); r < owned; r += kWarps) {
        if (candidate_of_row(r) < open) find_best(r, free > 0);
      }
    }
    expect(decided, (2 * open + (free > 0 ? open * kSummaryRows : 0)) * static_cast<int>(sizeof(int)));
    hopper::wait(decided, decided_parity_);
    decided_parity_ ^= 1;
    if (free > 0) {
      if (warp_id() == 0) claim(count);
      sync();
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int c = lane_id() + u * kWarp;
      if (c < count && choice.slot[u] < 0) choice.slot[u] = free > 0 ? work.slot[c] : work.best[rank[u]].slot;
    }
    // Fixed order had no registers left for the values.
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float4 x = *reinterpret_cast<const float4*>(work.v + slot_of(pair) * kDim + group * 64 + half_lane() * 4);
        float* const v = bank.v[pair] + group * 4;
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
      }
    }
  }

  // Candidates of which two slots are left: every block gets both cosines of all heads.
  __device__ void compare_pairs(Choice& choice, const int (&rank)[2], const T* value, const float* norm, int open) {
    auto* cosine = reinterpret_cast<float*>(work.gram);  // (Hkv, 64, 2)
#pragma unroll 1
    for (int u = 0; u < 2; ++u) {
      const int mine = u == 0 ? choice.slot[0] : choice.slot[1], place_of_mine = u == 0 ? rank[0] : rank[1];
#pragma unroll 1
      for (unsigned left_here = __ballot_sync(kAllLanes, mine < -1); left_here != 0; left_here &= left_here - 1) {
        const int lane = __ffs(left_here) - 1, c = lane + u * kWarp;
        const int two = __shfl_sync(kAllLanes, mine, lane), at = __shfl_sync(kAllLanes, place_of_mine, lane);
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
          if ((2 * at + which) % kWarps != warp_id() || !holds(left(two, which))) continue;
          float a[kParts], b[kParts];
          load_candidate(a, value, c);
          load_lane_row(b, work.v + left(two, which) * kDim);
          float square = lane_product<false>(b, b), dot = lane_product<false>(a, b);
#pragma unroll
          for (int offset = kWarp / 2; offset > 0; offset /= 2) {  // as warp_sum, both at once
            const float other_square = __shfl_xor_sync(kAllLanes, square, offset);
            dot = add_rn(dot, __shfl_xor_sync(kAllLanes, dot, offset));
            square = add_rn(square, other_square);
          }
          const float x = div_rn(dot, mul_rn(norm[c], clamped_root(square)));
          if (lane_id() < blocks()) {
            send(remote_address(cosine + (head * kSummaryRows + at) * 2 + which, lane_id()), x, remote_address(met, lane_id()));
          }
        }
      }
    }
    expect(met, heads * open * 2 * static_cast<int>(sizeof(float)));
    hopper::wait(met, met_parity_);
    met_parity_ ^= 1;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (choice.slot[u] >= -1) continue;
      const auto key = [&](int which) {
        return score_key(
            head_mean(cosine + rank[u] * 2 + which, 2 * kSummaryRows, heads, 1.0f / static_cast<float>(heads)));
      };
      choice.slot[u] = left(choice.slot[u], key(1) > key(0) ? 1 : 0);
    }
    __syncwarp();
  }

  // Cosines in fixed order of the open candidates and all slots, if any is used, and of the candidates with each other if some
  // may claim a slot.
  __device__ void compare(const T* value, const float* norm, int open, bool used, bool claims) const {
    const int base = part * kSlots, mine = used ? min(slots - base, kSlots) : 0;
    const int slot_groups = max(0, mine + kTileColumns - 1) / kTileColumns;
    const int groups = slot_groups + (claims ? kSlots / kTileColumns : 0);
    const auto candidate = [&](int c) { return work.open[min(c, open - 1)]; };
#pragma unroll 1
    for (int group = warp_id(); group < groups; group += kWarps) {
      const bool of_slots = group < slot_groups;
      const int column = base + (of_slots ? group : group - slot_groups) * kTileColumns;
      float columns[kTileColumns][kParts];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        if (of_slots) {
          load_lane_row(columns[j], work.v + min(column + j, slots - 1) * kDim);
        } else {
          load_candidate(columns[j], value, candidate(column + j));
        }
      }
      const int i = lane_id() / kTileColumns, j = column + lane_id() % kTileColumns;
      const float other_norm = of_slots ? column_norm(columns) : norm[candidate(j)];
#pragma unroll 1
      for (int batch = 0; batch * kTileRows < open; ++batch) {
        const int c = batch * kTileRows + i;
        const float dot = tile_dots<false>(columns, [&](float(&to)[kParts], int r) {
          load_candidate(to, value, candidate(batch * kTileRows + r));
        });
        const float cosine = div_rn(dot, mul_rn(norm[candidate(c)], other_norm));
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
    if (lane_id() < blocks()) {
      send(remote_address(work.best + c, lane_id()), best.key, static_cast<uint32_t>(best.slot),
           remote_address(decided, lane_id()));
    }
    if (!claims) return;
    const uint32_t a = score_key(mean_of(r, kSummaryRows + 2 * lane_id()));
    const uint32_t b = score_key(mean_of(r, kSummaryRows + 2 * lane_id() + 1));
#pragma unroll 1
    for (int block = 0; block < blocks(); ++block) {
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
    const uint32_t spawning = score_key(float_threshold(p.tau_spawn));  // of the least score that does not
    uint32_t free[2] = {free_mask(0), free_mask(1)};
    const auto lowest = [](const uint32_t (&bits)[2]) { return bits[0] != 0 ? __ffs(bits[0]) - 1 : __ffs(bits[1]) - 1 + kWarp; };
    int next = 0;  // the first candidate not yet decided
#pragma unroll 1
    while ((free[0] | free[1]) != 0) {
      uint32_t spawns[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        const bool spawns_here = match[u].key < spawning && match[u].key != kNanKey;
        spawns[u] = __ballot_sync(kAllLanes, c >= next && c < count && spawns_here);
      }
      if ((spawns[0] | spawns[1]) == 0) break;
      const int founder = lowest(spawns), claimed = lowest(free);
      if (free[0] != 0) {
        free[0] &= free[0] - 1;
      } else {
        free[1] &= free[1] - 1;
      }
      next = founder + 1;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        const uint32_t here = work.gram[founder * kSummaryRows + c];  // as that of c and the founder
        const bool nearer = c > founder && (here > match[u].key || (here == match[u].key && claimed < match[u].slot));
        if (nearer) match[u] = {here, claimed};
        if (c == founder) match[u].slot = claimed;
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int c = lane_id() + u * kWarp;
      if (c < count) work.slot[c] = match[u].slot;
    }
  }

  // Values move towards the means of what they were given.
  __device__ void move_values(Slots& bank, Members (&all)[kPairs], const Choice& choice, const T* value,
                              const CandidateList& list) const {
    const uint32_t rows = shared_address(value) + half_lane() * 8, packet = half_lane() / 2;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      Members& members = all[pair];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint32_t even = __ballot_sync(kAllLanes, choice.slot[u] == first + pair * 2);
        const uint32_t odd = __ballot_sync(kAllLanes, choice.slot[u] == first + pair * 2 + 1);
        members.of[u] = lane_id() < kWarp / 2 ? even : odd;
      }
      const bool here = members.any();
      if (!__any_sync(kAllLanes, here)) continue;
      float sum[kElements], mass;
      // Rows are swizzled: packet of row c is packet ^ c % 8.
      weigh<T, kGroups>(sum, mass, members, shared_address(list.gate), Shared::kPanelBytes,
                        [&](uint32_t c) { return rows - packet * 16 + c * 128 + (packet ^ c % 8) * 16; });
      const bool used = bank.mass[pair] > 0.0f;
      const float by = here ? mass : 1.0f;
      const Move move(log_stay, used, by);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        float& v = bank.v[pair][e];
        const float after = v + move.rate * (quotient(sum[e], by, move.share) - v);
        v = here ? after : v;
      }
      bank.mass[pair] = here ? used ? bank.mass[pair] + by : by : bank.mass[pair];
      if (half_lane() == 0) work.mass[slot_of(pair)] = bank.mass[pair];
      publish(bank, pair);
    }
  }

  // What was decided of a chunk, for who moves the keys, and the assignment, by two warps that have nothing to do until the
  // next decisions. Soon after such stores a fence would take long.
  __device__ void tell(int64_t row, const Members (&members)[kPairs], const Choice& choice) {
    if (head != 0) return;
    if (half_lane() == 0) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const auto [low, high] = members[pair].of;
        if (slot_of(pair) < slots) store_relaxed(members_to_ + 2 * pair, kThere | low, kThere | high);
      }
    }
    members_to_ += slots;
    if (rank != 0 || warp_id() >= 2) return;
    const int slot = warp_id() == 0 ? choice.slot[0] : choice.slot[1], c = lane_id() + warp_id() * kWarp;
    if (slot >= 0) p.assignment[row * p.chunk + p.lists.summary_offset[row * p.lists.tokens + c]] = slot;
  }

  // The values of all of this block's slots at once, as they were published. One warp.
  __device__ void copy_values(int64_t row) const {
    const int base = part * kSlots, count = min(slots - base, kSlots);
    if (lane_id() != 0) return;
    if (count > 0) {
      hopper::store_bytes(static_cast<float*>(p.summary_v) + view.summary_row(row, head, base), work.v + base * kDim,
                          count * kDim * static_cast<int>(sizeof(float)));
    }
    hopper::commit_stores();
  }
  __device__ void write_values(void* to, int64_t row, const Slots& bank) const {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (slot_of(pair) >= slots) continue;
      float* const at = static_cast<float*>(to) + view.summary_row(row, head, slot_of(pair)) + half_lane() * 4;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float* x = bank.v[pair] + group * 4;
        *reinterpret_cast<float4*>(at + group * 64) = {x[0], x[1], x[2], x[3]};
      }
    }
  }

  const BankScan& p;
  const ScanView<T> view;
  Shared& work;
  // Barriers: cosines of the candidates of this block, what was decided about all, cosines of pairs.
  uint64_t *scored, *decided, *met;
  const int rank, head, part, heads, slots, first, chunks, owned;  // first: slot of this warp
  const float log_stay;  // binary logarithm of 1 - eta
  uint32_t batch_to_ = 0, batch_scored_ = 0;
  bool batch_own_ = false;
  SlotMembers* members_to_ = nullptr;  // of this lane's first slot, in the next row
  uint32_t scored_parity_ = 0, decided_parity_ = 0, met_parity_ = 0;
};

}  // namespace coda::kernels::sm90
