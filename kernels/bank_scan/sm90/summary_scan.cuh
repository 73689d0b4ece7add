#pragma once

#include "../../common/mma.cuh"
#include "../../common/wgmma.cuh"
#include "../summary.cuh"
#include "cluster.cuh"
#include "summary_shared.cuh"

namespace coda::kernels::sm90 {

// More than twice the most by which the mean cosine of the tensor cores can differ from that in fixed order. Slots come as sums
// of two 16-bit numbers, off by 2^-18 of their norm, candidates as they are. Of the D / 16 accumulations of the high parts, 8 for
// D 128, each of 17 addends, none is off by more than 17 units in the last place, 2^-23, even where the tensor cores cut every
// addend, and those of the low parts are less by 2^-8. Norms, quotients and fixed order itself add 2^-18.6: 2.25e-5 together.
constexpr float kMargin = 0x1.8p-15f;

// One block of a cluster that walks the chunks of one sequence. A warp keeps its slots in registers, each lane kParts
// neighbouring elements. What others wait for, values and who goes where, comes first; keys and snapshots follow while scores
// travel.
template <class T, int kParts, int kBlocks>
class SummaryScan {
 public:
  static constexpr int kBarriers = 4;

  __device__ SummaryScan(const BankScan& params, int64_t n, unsigned char* shared, uint64_t* barriers)
      : p(params), view(params, n), work(*reinterpret_cast<Shared*>(shared)), scored(barriers), decided(barriers + 1),
        met(barriers + 2), multiplied(barriers + 3), rank(cluster_rank()), head(rank / kBlocks), part(rank % kBlocks),
        heads(params.kv_heads),
        slots(params.summary_slots), first(part * kSlots + warp_id() * kWarpSlots),
        chunks(static_cast<int>(view.span.chunks)), owned(Shared::owned(params.kv_heads, kBlocks)),
        log_stay(log2f(sigmoid(-static_cast<const float*>(params.eta_logit)[head]))) {}

  __device__ void run() {
    const Span& span = view.span;
    if (threadIdx.x == 0) {
      for (auto* barrier : {scored, decided, met}) hopper::init_barrier(barrier, 1);
      hopper::init_barrier(multiplied, kSlots / kGroupSlots * 4);
      hopper::fence_barrier_init();
    }
    cluster_arrive();
    // Of the batch of candidates whose scores this lane sends on.
    const int batch = warp_id() % 4 * 16 + lane_id() % (16 / kBatch) * kBatch;
    batch_to_ = remote_address(near(head, (warp_id() / 4 + part) % 2) + owned_row(batch) * kGroupSlots, owner(batch));
    batch_scored_ = remote_address(scored, owner(batch));
    batch_own_ = owner(batch) == rank;
    Slots bank;
    load_state(bank);
    snapshot_ = view.summary_row(span.row0, head, first);
    int i = 0;
    for (; i < chunks && !view.evicts(span.chunk_start(i, p.chunk)); ++i) {
      write_snapshot(span.row0 + i, bank);
    }
    ListGate<kSplits> lists{i};
    const auto await_list = [&](int chunk) {
      lists.await(chunk, chunks, [&] { return p.lists.summary_ready + view.span.row0 * kSplits; });
    };
    await_list(i + 2);
    int count = count_of(i), next_count = count_of(i + 1), free = 1;
    // Buffers of this chunk: values come two chunks ahead, keys only with it.
    int values = 0, list = 0, turn = 0;
    const auto list_at = [&](int ahead) -> CandidateList& { return work.list[(list + ahead) % Shared::kLists]; };
    if (fetcher() >= 0) {
      for (int ahead = 0; ahead < 3; ++ahead) fetch_list(i + ahead, list_at(ahead));
    }
    await_copies();
    sync();
    if (fetcher() >= 0) {
      for (int ahead = 0; ahead < 2; ++ahead) fetch_values(i + ahead, list_at(ahead), work.value[ahead]);
    }
    await_copies();
    sync();
    Moves moves{};
    Choice choice{-1, -1};
    const int last_list = Shared::kLists - 1;
    // What nothing waits for.
    const auto finish = [&](int done) {
      move_keys(bank, moves, work.key[(turn - 1) % 2], list_at(last_list).gate);
      write_snapshot(span.row0 + done, bank);
      if (rank != 0 || warp_id() != 0) return;
      int32_t* to = p.assignment + (span.row0 + done) * p.chunk;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (choice.slot[u] >= 0) to[list_at(last_list).offset[lane_id() + u * kWarp]] = choice.slot[u];
      }
    };
    cluster_wait();
#pragma unroll 1
    for (; i < chunks; ++i) {
      const int after = values == 2 ? 0 : values + 1, later = after == 2 ? 0 : after + 1;
      if (free > 0) {
        free = free_slots();  // a slot once in use stays so
        if (free == 0) sync();
      }
      CandidateList& here = list_at(0);
      if (fetcher() >= 0) await_list(i + 3);
      if (count > 0 && free < slots) {
        if (warp_id() == kWarps - 1) {  // that has nothing to multiply
          if (const int rows = owned_count(count); rows > 0) {
            const int batches = (rows + kBatch - 1) / kBatch;
            expect(scored, heads * (kSummaryRows / kGroupSlots) * batches * kBatchBytes, lane_id() == 0);
          }
          expect(decided, count * static_cast<int>(sizeof(int)), lane_id() == 0);
        }
        approximate(work.value[values], here.norm, count);
        // All together, instructions would be issued no faster than the products need theirs: what has time waits.
        if (kBlocks == 2 && fetcher() >= 0) {
          hopper::wait(multiplied, multiplied_parity_);
          multiplied_parity_ ^= 1;
        }
      }
      // While the scores travel: what the last chunk left to do, and what the next ones need.
      if (turn > 0) finish(i - 1);
      if (fetcher() >= 0) {
        fetch_keys(here, work.key[turn % 2]);
        fetch_values(i + 2, list_at(2), work.value[later]);
        fetch_list(i + 3, list_at(3));
      }
      const int later_count = count_of(i + 2);
      moves.met = false;
      choice = {-1, -1};
      if (count > 0) {
        choice = choose(bank, work.value[values], here.norm, count, free);
        move_values(bank, moves, choice, work.value[values], here.gate);
        if (free > 0) mark_used(choice);
      }
      await_copies();
      sync();
      values = after;
      list = (list + 1) % Shared::kLists;
      ++turn;
      count = next_count;
      next_count = later_count;
    }
    if (turn > 0) finish(chunks - 1);
    const int64_t kept = view.summary_row(view.n, head, first);
    write_rows(static_cast<float*>(p.new_summary_k) + kept, bank.k);
    write_rows(static_cast<float*>(p.new_summary_v) + kept, bank.v);
    write_mass(p.new_summary_mass, view.n, bank);
  }

 private:
  static constexpr int kDim = kParts * kWarp;
  static constexpr int kWarpSlots = kSummaryRows / kBlocks / (kScanThreads / kWarp);  // neighbouring slots that a warp keeps
  // Of one block: its slots, its warps, and how many neighbouring candidates' scores it sums.
  static constexpr int kSlots = kSummaryRows / kBlocks, kWarps = kScanThreads / kWarp, kBatch = kTileRows / kBlocks,
                       kBatchBytes = kBatch * kGroupSlots * static_cast<int>(sizeof(float));
  using Shared = SummaryShared<T, kDim>;
  // Warps that neither multiply nor settle fetch for all. Packets of 16 bytes of a row, rows of a warp, and packets of a lane.
  static constexpr int kFetchers = kWarps / 2, kRowPackets = kDim / kPacket, kFetchedRows = kSummaryRows / kFetchers,
                       kLoads = kFetchedRows * kRowPackets / kWarp;
  struct Slots {
    float k[kWarpSlots][kParts], v[kWarpSlots][kParts];
    float mass[kWarpSlots];
  };
  // Who went to this warp's slots, bits of candidates c and c + 32, and which slots held something before.
  struct Moves {
    uint32_t members[kWarpSlots][2];
    unsigned used;
    bool met;  // any
  };
  struct Choice {
    int slot[2];  // of candidates lane and lane + 32, -1 beyond the last
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
    for (int s = 0; s < kWarpSlots; ++s) {
      bank.mass[s] = first + s < slots ? mass[first + s] : 0.0f;
      const bool read = first + s < slots && (chunks == 0 || bank.mass[s] > 0.0f);
      const int64_t at = view.summary_row(view.n, head, first + s) + lane_id() * kParts;
#pragma unroll
      for (int e = 0; e < kParts; ++e) {
        bank.k[s][e] = read ? static_cast<const float*>(p.state_summary_k)[at + e] : 0.0f;
        bank.v[s][e] = read ? static_cast<const float*>(p.state_summary_v)[at + e] : 0.0f;
      }
    }
    publish(bank);
  }

  template <int kElements>
  static __device__ void store_row(float* to, const float (&x)[kElements]) {
    if constexpr (kElements == 4) {
      *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
    } else {
      *reinterpret_cast<float2*>(to) = {x[0], x[1]};
    }
  }

  static __device__ void load_row(float (&x)[kParts], const float* from) {
    using Row = std::conditional_t<kParts == 4, float4, float2>;
    const Row row = *reinterpret_cast<const Row*>(from);
    x[0] = row.x;
    x[1] = row.y;
    if constexpr (kParts == 4) {
      x[2] = row.z;
      x[3] = row.w;
    }
  }

  // The sum over lanes of kWarpSlots numbers each: lane l gets that of number l / (32 / kWarpSlots).
  static __device__ float sums(float (&x)[kWarpSlots]) {
    int offset = kWarp / 2;
#pragma unroll
    for (int count = kWarpSlots / 2; count > 0; count /= 2, offset /= 2) {
      const bool upper = lane_id() & offset;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float given = upper ? x[i] : x[i + count], kept = upper ? x[i + count] : x[i];
        x[i] = kept + __shfl_xor_sync(kAllLanes, given, offset);
      }
    }
#pragma unroll
    for (; offset > 0; offset /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], offset);
    return x[0];
  }

  // This warp's values in fixed order's reach, and as the tensor cores read them once await_copies has ordered that.
  __device__ void publish(const Slots& bank) const {
    float squares[kWarpSlots];
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      squares[s] = 0.0f;
#pragma unroll
      for (int e = 0; e < kParts; ++e) squares[s] += bank.v[s][e] * bank.v[s][e];
    }
    // What no 16-bit numbers can stand for becomes NaN, and is left to fixed order.
    const float square = sums(squares);
    const float scale_here = square < CUDART_INF_F ? rsqrtf(fmaxf(square, 1e-12f)) : CUDART_NAN_F;
    T* direction = work.direction[first / kGroupSlots];
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      const float scale = __shfl_sync(kAllLanes, scale_here, s * (kWarp / kWarpSlots));
      store_row(work.v + (first + s) * kDim + lane_id() * kParts, bank.v[s]);
      float high[kParts], low[kParts];
#pragma unroll
      for (int e = 0; e < kParts; ++e) high[e] = bank.v[s][e] * scale;
#pragma unroll
      for (int e = 0; e < kParts; e += 2) {
        const float2 held = unpack<T>(pack<T>(high[e], high[e + 1]));
        low[e] = high[e] - held.x;
        low[e + 1] = high[e + 1] - held.y;
      }
      // Slot 8 t + 2 b + e of the 32 is row 8 b + 2 t + e, so that a lane of the products has eight neighbouring slots.
      const int slot = (first + s) % kGroupSlots, row = slot % 8 / 2 * 8 + slot / 8 * 2 + slot % 2;
      T* const to = place(direction, row, lane_id() * kParts);
      store_part(to, high);
      store_part(to + kGroupSlots * (Shared::kPanelBytes / kSummaryRows / static_cast<int>(sizeof(T))), low);
    }
  }
  // Element d of a row of swizzled panels.
  template <class Element>
  static __device__ Element* place(Element* rows, int row, int d) {
    const int packet = hopper::swizzled(row, d % 64 / kPacket) / static_cast<int>(sizeof(T));
    return rows + d / 64 * (Shared::kPanelBytes / static_cast<int>(sizeof(T))) + packet + d % kPacket;
  }

  __device__ int count_of(int i) const { return i < chunks ? p.lists.summary_count[view.span.row0 + i] : 0; }

  // The fetchers are numbered from 0; others get a negative number. Which packet of which row is this lane's.
  static __device__ int fetcher() {
    const int quarter = warp_id() / 4;  // the first four warps multiply, with one block a head eight; as many settle first
    constexpr int settling = kWarps / 2 / 4;
    if constexpr (kBlocks == 2) return quarter == 1 || quarter == settling + 1 ? quarter / 2 * 4 + warp_id() % 4 : -1;
    return quarter < settling ? -1 : warp_id() - kWarps / 2;
  }
  static __device__ int fetched_row(int load) {
    return fetcher() * kFetchedRows + (load * kWarp + lane_id()) / kRowPackets;
  }
  static __device__ int fetched_element() { return lane_id() % kRowPackets * kPacket; }
  static __device__ void fetch(T* to, const void* from) {
    ampere::copy_packet(to, static_cast<const T*>(from) + fetched_element(), true);
  }
  __device__ void fetch_values(int i, const CandidateList& list, T* to) const {
    if (i >= chunks) return;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int row = fetched_row(load);
      if (row < p.lists.tokens) fetch(place(to, row, fetched_element()), list.rows[row].value);
    }
  }
  __device__ void fetch_keys(const CandidateList& list, T* to) const {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int row = fetched_row(load);
      if (row < p.lists.tokens) fetch(to + row * kDim + fetched_element(), list.rows[row].key);
    }
  }
  __device__ void fetch_list(int i, CandidateList& list) const {
    if (i >= chunks) return;
    const int64_t row = view.span.row0 + i;
    const auto packet = [&](auto* to, const auto* from, int at) {
      ampere::copy_packet(reinterpret_cast<uint4*>(to) + at, reinterpret_cast<const uint4*>(from) + at, true);
    };
    const int at = fetcher() % 2 * kWarp + lane_id(), words = p.lists.tokens / 4;
    switch (fetcher() / 2) {
      case 0:
        if (at < p.lists.tokens) packet(list.rows, p.lists.summary_rows + (row * heads + head) * p.lists.tokens, at);
        break;
      case 1:
        if (at < words) packet(list.gate, p.lists.summary_gate + row * p.lists.tokens, at);
        break;
      case 2:
        if (at < words) packet(list.norm, p.lists.summary_norm + (row * heads + head) * p.lists.tokens, at);
        break;
      case 3:
        if (at < words) packet(list.offset, p.lists.summary_offset + row * p.lists.tokens, at);
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
  // The sum over heads, in any order.
  __device__ float total_of(int row, int column) const {
    const float* from = near(0, column / kGroupSlots) + row * kGroupSlots + column % kGroupSlots;
    const int stride = 2 * owned * kGroupSlots;
    float total = 0.0f;
    if (heads == kClusterBlocks) {  // without a branch in between, so that all are read at once
#pragma unroll
      for (int h = 0; h < kClusterBlocks; ++h) total += from[h * stride];
    } else {
#pragma unroll 1
      for (int h = 0; h < heads; ++h) total += from[h * stride];
    }
    return total;
  }
  static __device__ void expect(uint64_t* barrier, int bytes, bool here = threadIdx.x == 0) {
    if (here) hopper::arrive_expect(barrier, bytes);
  }

  // Cosines of all candidates and slots by the tensor cores, 32 slots a warpgroup; sent to the blocks that sum them. Also where
  // there are no slots: so no block can be a chunk ahead of another.
  __device__ void approximate(const T* value, const float* norm, int count) const {
    const int group = warp_id() / 4 + part, g = lane_id() / 4, first_row = warp_id() % 4 * 16;
    if (warp_id() / 4 >= kSlots / kGroupSlots) return;
    float d[32];
    const auto a = hopper::rows_descriptor(value), b = hopper::rows_descriptor(work.direction[group]);
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const int at = (step / 4 * Shared::kPanelBytes + step % 4 * 32) / 16;
      hopper::multiply<T, 0, 0>(d, a + at, b + at, step > 0);
    }
    hopper::commit_products();
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) inverse[half] = __fdividef(1.0f, norm[first_row + half * 8 + g]);
    hopper::wait_products<0>();
    hopper::pin(d);
    float* const rows = outgoing() + (warp_id() / 4 * kSummaryRows + first_row) * kGroupSlots;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int four = 0; four < 8; four += 4) {
        float x[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const int at = (four + u) / 2 * 4 + half * 2 + u % 2;
          x[u] = (d[at] + d[at + 16]) * inverse[half];
        }
        store_row(rows + (half * 8 + g) * kGroupSlots + lane_id() % 4 * 8 + four, x);
      }
    }
    hopper::fence_async_proxy();
    __syncwarp();
    // A batch a lane; this block's own, which a bulk copy must not take, by the whole warp.
    if (lane_id() == 0) hopper::arrive(multiplied);
    const bool sends = lane_id() < 16 / kBatch && first_row + lane_id() * kBatch < count;
    if (sends && !batch_own_) send_bytes(batch_to_, rows + lane_id() * kBatch * kGroupSlots, kBatchBytes, batch_scored_);
    for (unsigned left = __ballot_sync(kAllLanes, sends && batch_own_); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const uint32_t to = __shfl_sync(kAllLanes, batch_to_, lane), barrier = __shfl_sync(kAllLanes, batch_scored_, lane);
      for (int i = lane_id(); i < kBatchBytes / 16; i += kWarp) {
        send(to + i * 16, reinterpret_cast<const uint4*>(rows + lane * kBatch * kGroupSlots)[i], barrier);
      }
    }
  }

  // What is told of a candidate: its slot, -1 where it is open, or which two slots alone are left.
  static __device__ int told(int a, int b) { return -2 - (a | b << 8); }
  static __device__ int left(int choice, int which) { return (-2 - choice) >> (8 * which) & 0xff; }

  // Tells all blocks the slot of this block's r-th candidate if rounding cannot change it. While slots are free, it must not
  // claim one either. One warp.
  __device__ void settle(int r, bool claims) const {
    const float margin = kMargin * static_cast<float>(heads), least = static_cast<float>(p.tau_spawn) * heads + margin;
    float score[2];
    unsigned near[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int j = lane_id() + u * kWarp;
      score[u] = j < slots && (!claims || work.mass[j] > 0.0f) ? total_of(r, j) : -CUDART_INF_F;
    }
    const float top = score_of(__reduce_max_sync(kAllLanes, max(score_key(score[0]), score_key(score[1]))));
#pragma unroll
    for (int u = 0; u < 2; ++u) near[u] = __ballot_sync(kAllLanes, !(score[u] < top - margin));
    const int nearest = __popc(near[0]) + __popc(near[1]);
    const int lowest = near[0] ? __ffs(near[0]) - 1 : kWarp + __ffs(near[1]) - 1;
    const int highest = near[1] ? 2 * kWarp - 1 - __clz(near[1]) : kWarp - 1 - __clz(near[0]);
    int choice = -1;
    if (fabsf(top) <= 2.0f * static_cast<float>(heads)) {
      if (nearest == 1 && (!claims || top > least)) choice = lowest;
      if (nearest == 2 && !claims && top > margin) choice = told(lowest, highest);
    }
    if (lane_id() < blocks()) {
      send(remote_address(work.choice + candidate_of_row(r), lane_id()), static_cast<uint32_t>(choice),
           remote_address(decided, lane_id()));
    }
  }

  static __device__ void load_candidate(float (&to)[kParts], const T* value, int c) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) to[k] = widen(*place(value, c, lane_id() + k * kWarp));
  }

  // Slot of every candidate. Only while slots are free may one claim one, and then all wait for fixed order. All warps.
  __device__ Choice choose(Slots& bank, const T* value, const float* norm, int count, int free) {
    Choice choice{-1, -1};
    int open = count, rank[2] = {0, 0};
    bool pairs = free == 0;
    if (free < slots) {
      if (this->rank * kBatch < count) {
        hopper::wait(scored, scored_parity_);
        scored_parity_ ^= 1;
        // First those warps that had nothing to multiply.
        for (int r = warp_id() ^ kWarps >> 1; r < owned; r += kWarps) {
          if (candidate_of_row(r) < count) settle(r, free > 0);
        }
      }
      hopper::wait(decided, decided_parity_);
      decided_parity_ ^= 1;
      bool settled = true;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        if (c < count) settled &= (choice.slot[u] = work.choice[c]) >= 0;
      }
      if (__all_sync(kAllLanes, settled)) {
        if (free > 0) sync();  // which slots are in use has been read
        return choice;
      }
      open = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int c = lane_id() + u * kWarp;
        const unsigned mask = __ballot_sync(kAllLanes, c < count && choice.slot[u] < 0);
        rank[u] = open + __popc(mask & ((1u << lane_id()) - 1));
        open += __popc(mask);
        pairs = pairs && !__any_sync(kAllLanes, c < count && choice.slot[u] == -1);
      }
    }
    if (pairs) {
      compare_pairs(choice, rank, value, norm, open);
      return choice;
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
    compare(value, norm, open, free > 0);
    if (const int rows = owned_count(open); rows > 0) {
      expect(scored, heads * (rows * (slots + (free > 0 ? kSummaryRows : 0))) * static_cast<int>(sizeof(float)));
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
    for (int s = 0; s < kWarpSlots; ++s) load_row(bank.v[s], work.v + (first + s) * kDim + lane_id() * kParts);
    return choice;
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
          const float other_norm = lane_norm(b), dot = warp_sum(lane_product<false>(a, b));
          const float x = div_rn(dot, mul_rn(norm[c], other_norm));
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

  // Cosines in fixed order of the open candidates and all slots, and of the candidates with each other if some may claim a slot.
  __device__ void compare(const T* value, const float* norm, int open, bool claims) const {
    const int base = part * kSlots, mine = min(slots - base, kSlots);
    const int slot_groups = max(0, mine + kTileColumns - 1) / kTileColumns;
    const int groups = slot_groups + (claims && part == 0 ? kSummaryRows / kTileColumns : 0);
    const auto candidate = [&](int c) { return work.open[min(c, open - 1)]; };
#pragma unroll 1
    for (int group = warp_id(); group < groups; group += kWarps) {
      const bool of_slots = group < slot_groups;
      const int column = of_slots ? base + group * kTileColumns : (group - slot_groups) * kTileColumns;
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

  // The sums of the members' rows, each times its gate, in order, and those of their gates. One member of each slot at a time, so
  // that their loads are underway together.
  template <class Part>
  static __device__ void weigh(float (&sum)[kWarpSlots][kParts], float (&mass)[kWarpSlots], const Moves& moves, const float* gate,
                               Part part) {
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      mass[s] = 0.0f;
#pragma unroll
      for (int e = 0; e < kParts; ++e) sum[s][e] = 0.0f;
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint32_t left[kWarpSlots];
#pragma unroll
      for (int s = 0; s < kWarpSlots; ++s) left[s] = moves.members[s][u];
      const auto any = [&] {
        uint32_t all = 0;
#pragma unroll
        for (int s = 0; s < kWarpSlots; ++s) all |= left[s];
        return all != 0;
      };
#pragma unroll 1
      while (any()) {
        float weight[kWarpSlots], x[kWarpSlots][kParts];
#pragma unroll
        for (int s = 0; s < kWarpSlots; ++s) {
          const int c = u * kWarp + __clz(__brev(left[s])) % kWarp;
          weight[s] = gate[c];
          load_part(x[s], part(c));
        }
#pragma unroll
        for (int s = 0; s < kWarpSlots; ++s) {
          const bool here = left[s] != 0;
          mass[s] = here ? mass[s] + weight[s] : mass[s];
#pragma unroll
          for (int e = 0; e < kParts; ++e) sum[s][e] = here ? sum[s][e] + weight[s] * x[s][e] : sum[s][e];
          left[s] &= left[s] - 1;
        }
      }
    }
  }

  // Values move towards the means of what they were given. A free slot, which is 0, becomes the mean.
  __device__ void move_values(Slots& bank, Moves& moves, const Choice& choice, const T* value, const float* gate) const {
    uint32_t all = 0;
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
#pragma unroll
      for (int u = 0; u < 2; ++u) all |= moves.members[s][u] = __ballot_sync(kAllLanes, choice.slot[u] == first + s);
    }
    moves.met = all != 0;
    if (!moves.met) return;
    moves.used = 0;
    float sum[kWarpSlots][kParts], mass[kWarpSlots];
    weigh(sum, mass, moves, gate, [&](int c) { return place(value, c, lane_id() * kParts); });
    // Without branches, so that slots do not wait for each other.
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      const bool here = moved(moves, s), used = bank.mass[s] > 0.0f;
      moves.used |= static_cast<unsigned>(used) << s;
      const float by = here ? mass[s] : 1.0f, share = reciprocal(by), rate = rate_of(used, by);
      bank.mass[s] = here ? used ? bank.mass[s] + by : by : bank.mass[s];
#pragma unroll
      for (int e = 0; e < kParts; ++e) {
        const float next = bank.v[s][e] + rate * (quotient(sum[s][e], by, share) - bank.v[s][e]);
        bank.v[s][e] = here ? next : bank.v[s][e];
      }
    }
    if (lane_id() == 0) {
#pragma unroll
      for (int s = 0; s < kWarpSlots; ++s) work.mass[first + s] = bank.mass[s];
    }
    publish(bank);
  }
  // Rounded as a division would be, of normal numbers.
  static __device__ float reciprocal(float x) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(x));
    return __fmaf_rn(__fmaf_rn(-x, near, 1.0f), near, near);
  }
  __device__ float rate_of(bool used, float mass) const { return used ? ema_rate(log_stay, mass) : 1.0f; }
  static __device__ bool moved(const Moves& moves, int s) { return (moves.members[s][0] | moves.members[s][1]) != 0; }

  // Keys follow, with what the values were moved by.
  __device__ void move_keys(Slots& bank, const Moves& moves, const T* key, const float* gate) const {
    if (!moves.met) return;
    float sum[kWarpSlots][kParts], mass[kWarpSlots];
    weigh(sum, mass, moves, gate, [&](int c) { return key + c * kDim + lane_id() * kParts; });
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      if (!moved(moves, s)) continue;
      const float share = reciprocal(mass[s]), rate = rate_of(moves.used >> s & 1, mass[s]);
#pragma unroll
      for (int e = 0; e < kParts; ++e) bank.k[s][e] += rate * (sum[s][e] * share - bank.k[s][e]);
    }
  }

  // This warp's slots to row `row` of a snapshot; rows come one after the other.
  __device__ void write_snapshot(int64_t row, const Slots& bank) {
    write_rows(static_cast<float*>(p.summary_k) + snapshot_, bank.k);
    write_rows(static_cast<float*>(p.summary_v) + snapshot_, bank.v);
    write_mass(p.summary_mass, row, bank);
    snapshot_ += heads * slots * kDim;
  }
  __device__ void write_mass(void* to, int64_t row, const Slots& bank) const {
    if (head != 0 || lane_id() != 0) return;
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      if (first + s < slots) static_cast<float*>(to)[row * slots + first + s] = bank.mass[s];
    }
  }
  __device__ void write_rows(float* to, const float (&rows)[kWarpSlots][kParts]) const {
#pragma unroll
    for (int s = 0; s < kWarpSlots; ++s) {
      if (first + s < slots) store_row(to + s * kDim + lane_id() * kParts, rows[s]);
    }
  }

  const BankScan& p;
  const ScanView<T> view;
  Shared& work;
  // Barriers: cosines of the candidates of this block, what was decided about all, cosines of pairs, and that products are done.
  uint64_t *scored, *decided, *met, *multiplied;
  const int rank, head, part, heads, slots, first, chunks, owned;  // first: slot of this warp
  const float log_stay;  // binary logarithm of 1 - eta
  uint32_t batch_to_ = 0, batch_scored_ = 0;
  bool batch_own_ = false;
  int64_t snapshot_;  // where this warp's slots go in the next row
  uint32_t scored_parity_ = 0, decided_parity_ = 0, met_parity_ = 0, multiplied_parity_ = 0;
};

}  // namespace coda::kernels::sm90
