#include "../../common/mma.cuh"
#include "../gates.cuh"
#include "../launch.h"
#include "cluster.cuh"
#include "routing.cuh"
#include "steps.h"

#include <algorithm>

namespace coda::kernels::sm90 {
namespace {

constexpr int kHeadWarps = 8, kTimeWarps = 4, kHeadThreads = kHeadWarps * kWarp, kTimeThreads = kTimeWarps * kWarp;
enum Barrier { kHeads = 1, kTimes };  // named ones

// What a warp compares at once: columns, slots or candidates, with as many candidates.
constexpr int kSide = 8, kPairs = kSide * kSide;
constexpr int kMostSlots = kPerLane * kWarp;

// Key of a mean cosine that is a number below tau_novel, and whose value no decision asks for.
constexpr uint32_t kLowKey = kNanKey + 1;
// The tensor cores' mean cosine and the one in fixed order differ by less: each has products that are exact, sums of 128 of them
// within 2^-14 of the product of the norms, and a few more roundings.
constexpr float kMargin = 1.0f / 4096;

// What screened cosines tell of a candidate: all that its decision may ask for; all but how near candidates compare with
// each other and with slots; not enough.
enum Verdict { kClear, kClose, kUnsure };

template <int kDim, int kBatches>
struct alignas(16) RouteShared {
  static constexpr int kRows = kBatches * kSide, kColumns = kMostSlots + kRows;
  static constexpr int kPitch = kDim + kPacket;  // 8 rows of a packet each meet all banks
  uint16_t rows[kHeadWarps][2 * kSide][kPitch];  // of a head: columns, then candidates
  float cosine[kHeadWarps][2 * kPairs];          // column by column; of the candidates as columns in the second half
  uint32_t near[2 * kPairs / kWarp];             // bits of pairs whose cosine is needed in fixed order
  uint32_t again;                                // block 0's word: the candidates that need it
  // The rest in block 0 alone. Columns are the slots and, from kMostSlots on, the candidates.
  alignas(16) uint32_t stamp[kMostSlots];  // of SlotQueue
  uint32_t order[kRows];                   // of the candidates' times
  int age[kMostSlots];                     // place of a slot in the order of stamps
  int oldest[kMostSlots];                  // the slot there
  int64_t time[kColumns];                  // last touch, INT64_MIN of free slots; position
  uint32_t far;                            // not 0: times lie too far apart for 32 bits
  uint32_t key[kRows][kColumns + 1];       // of the means; of odd length: a column meets all banks
  Match match[kRows];                      // best slot, p.slots if all are low
  uint32_t met[kRows];                     // earlier candidates that are near
  Verdict verdict[kRows];
  int filled[kWarp];
};

__host__ __device__ inline int blocks_of(const RouteExactBankParams& p) {
  const int groups = (p.slots + kSide - 1) / kSide;
  return groups < kClusterBlocks ? groups : kClusterBlocks;
}

// 1 / max(sqrt(square), 1e-6), about; NaN where a sum of squares in another order could be infinite.
__device__ inline float inverse_norm(float square) {
  return square < 1e38f ? rsqrtf(fmaxf(square, 1e-12f)) : CUDART_NAN_F;
}

// Cosines of one head from the tensor cores: all pairs, and those of the candidates with each other.
template <class T, class Shared>
__device__ void screen(Shared& work, int head) {
  constexpr int kSteps = (Shared::kPitch - kPacket) / (2 * kPacket);
  const uint16_t* row = work.rows[head][lane_id() % (2 * kSide)] + lane_id() / (2 * kSide) * kPacket;
  float dot[2][4] = {}, square[2][4] = {};  // two sums each, so that more products are underway
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t a[4];
    load_matrices(a, row + s * 2 * kPacket);
    ampere::multiply<T>(dot[s % 2], a, a[1], a[3]);
    const uint32_t columns[4] = {a[0], 0, a[2], 0};
    ampere::multiply<T>(square[s % 2], columns, a[0], a[2]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    dot[0][i] += dot[1][i];
    square[0][i] += square[1][i];
  }
  // The square of row i is element (i, i) of a product: in lane 4 i + i / 2.
  const int g = lane_id() / 4, c = lane_id() % 4, diagonal = 4 * g + g / 2;
  const float of_column = g % 2 ? square[0][1] : square[0][0], of_candidate = g % 2 ? dot[0][3] : dot[0][2];
  const float column = inverse_norm(__shfl_sync(kAllLanes, of_column, diagonal));
  const float candidate = inverse_norm(__shfl_sync(kAllLanes, of_candidate, diagonal));
  const float first = __shfl_sync(kAllLanes, candidate, 8 * c), second = __shfl_sync(kAllLanes, candidate, 8 * c + 4);
  float2* to = reinterpret_cast<float2*>(work.cosine[head] + g * kSide + 2 * c);
  to[0] = {dot[0][0] * column * first, dot[0][1] * column * second};
  to[kPairs / 2] = {dot[0][2] * candidate * first, dot[0][3] * candidate * second};
}

// The sum over d of the products whose partial sums 8 m + 2 (lane % 4) + e are x[2 m + e], folded as in fixed_order_dot.
__device__ inline float fold(float (&x)[kSide]) {
#pragma unroll
  for (int width = 4; width >= 2; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = add_rn(x[i], x[i + width]);
  }
#pragma unroll
  for (int width = 2; width >= 1; width /= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = add_rn(x[i], __shfl_xor_sync(kAllLanes, x[i], width));
  }
  return add_rn(x[0], x[1]);
}

// Cosines of one head in fixed order: of the pairs in `near`, those of column lane / 4 one after the other. Products of two
// 16-bit numbers are exact in float32 short of overflow and underflow, so a fused multiply-add rounds like the sum of a rounded
// product.
template <class T, class Shared>
__device__ void compare(Shared& work, int head) {
  constexpr int kParts = (Shared::kPitch - kPacket) / kWarp;
  const int group = lane_id() / 4, line = lane_id() % kSide, part = lane_id() / kSide * kPacket;
  const auto dot = [&](int column, int candidate) {
    float sums[kSide];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      uint32_t x[4], y[4];
      load_matrices(x, work.rows[head][column] + part + k * kWarp);
      load_matrices(y, work.rows[head][candidate] + part + k * kWarp);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 a = unpack<T>(x[m]), b = unpack<T>(y[m]);
        sums[2 * m] = k == 0 ? mul_rn(a.x, b.x) : __fmaf_rn(a.x, b.x, sums[2 * m]);
        sums[2 * m + 1] = k == 0 ? mul_rn(a.y, b.y) : __fmaf_rn(a.y, b.y, sums[2 * m + 1]);
      }
    }
    return fold(sums);
  };
  float norm[2];
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const float here = clamped_root(dot(half * kSide + line, half * kSide + line));
    norm[0] = half == 0 ? here : norm[0];
    norm[1] = here;
  }
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const auto pairs = [&](int column) { return work.near[(half * kSide + column) / 4] >> column % 4 * kSide & 0xffu; };
    const float column_norm = half == 0 ? norm[0] : norm[1];
    uint32_t mine = pairs(group), brought = pairs(line);
    for (; __any_sync(kAllLanes, mine != 0); mine &= mine - 1, brought &= brought - 1) {
      const int c = mine != 0 ? __ffs(mine) - 1 : 0;
      const float product = dot(half * kSide + line, kSide + (brought != 0 ? __ffs(brought) - 1 : 0));
      const float cosine = div_rn(product, mul_rn(__shfl_sync(kAllLanes, norm[1], 4 * c), column_norm));
      if (lane_id() % 4 == 0 && mine != 0) work.cosine[head][half * kPairs + group * kSide + c] = cosine;
    }
  }
}

// The slots in the order of their last touch, free ones first, sinks without a place; and what becomes of those that no candidate
// touches. All warps behind those of the heads. work.far is 0.
template <class Shared>
__device__ void order_slots(const RouteExactBankParams& p, Shared& work, int64_t b) {
  const int first = threadIdx.x - kHeadThreads;
  constexpr int64_t kReach = 1 << 23;
  const int64_t origin = p.position[b * p.candidates];
  const auto stamp = [&](int i, int64_t time, uint32_t order) {
    work.stamp[i] = i < p.num_sinks || i >= p.slots ? ~0u : time != INT64_MIN ? (order + 1) << kSlotBits | i : i;
  };
  const auto order = [&](int64_t time) {
    const uint64_t since = static_cast<uint64_t>(time) - static_cast<uint64_t>(origin) + kReach;
    if (since >= 2 * kReach || (time ^ origin) < 0) atomicOr(&work.far, 1u);
    return static_cast<uint32_t>(since);
  };
  int64_t time = INT64_MIN;
  if (first < p.slots) {
    const bool used = p.used[b * p.slots + first];
    const int64_t touched = p.last_touch[b * p.slots + first];
    p.new_last_touch[b * p.slots + first] = touched;
    if (used) time = touched;
  }
  work.time[first] = time;
  stamp(first, time, time != INT64_MIN ? order(time) : 0);
  const int64_t position = first < p.candidates ? p.position[b * p.candidates + first] : 0;
  if (first < p.candidates) {
    work.order[first] = order(position);
    work.time[kMostSlots + first] = position;
  }
  hopper::sync_threads(kTimes, kTimeThreads);
  if (work.far != 0) {
    const auto among = [&](int64_t mine) {
      return order_among(work.time, p.slots, mine) + order_among(work.time + kMostSlots, p.candidates, mine);
    };
    stamp(first, time, among(time));
    if (first < p.candidates) work.order[first] = among(position);
  }
  hopper::sync_threads(kTimes, kTimeThreads);
  // Two threads a slot.
  for (int i = first / 2; i < p.slots; i += kTimeThreads / 2) {
    const uint32_t mine = work.stamp[i];
    int age = 0;
#pragma unroll 4
    for (int j = first % 2 * 4; j < p.slots; j += 8) {
      const uint4 other = *reinterpret_cast<const uint4*>(work.stamp + j);
      age += (other.x < mine) + (other.y < mine) + (other.z < mine) + (other.w < mine);
    }
    age += __shfl_xor_sync(3u << (lane_id() & ~1), age, 1);
    if (i < p.num_sinks) age = kSinkAge;
    if (first % 2 == 0) work.age[i] = age;
    if (first % 2 == 1 && i >= p.num_sinks) work.oldest[age] = i;
  }
  hopper::sync_threads(kTimes, kTimeThreads);
}

// Best slot of candidate c and what else decisions rest on; `exact` in the second turn, where what was not clear is. One warp.
template <class Shared>
__device__ void judge(const RouteExactBankParams& p, Shared& work, int c, bool exact) {
  uint32_t keys[kPerLane + 1];  // of slots, then of an earlier candidate
  Match match{0, p.slots};
#pragma unroll
  for (int u = 0; u < kPerLane; ++u) {
    const int j = lane_id() + u * kWarp;
    keys[u] = j < p.slots ? work.key[c][j] : 0;
    if (keys[u] > match.key) match = {keys[u], j};
  }
  keys[kPerLane] = lane_id() < c ? work.key[c][kMostSlots + lane_id()] : 0;
  const uint32_t best = __reduce_max_sync(kAllLanes, match.key);
  // If all are low it does not matter which slot that is, nor what becomes of it.
  match.slot = __reduce_min_sync(kAllLanes, best == match.key && best != kLowKey ? match.slot : p.slots);
  const unsigned met = __ballot_sync(kAllLanes, keys[kPerLane] > kLowKey);
  const float novel = static_cast<float>(p.tau_novel), matching = static_cast<float>(p.tau_match);
  bool unsure = false, close = false;
  int near = 0;
#pragma unroll
  for (int u = 0; u <= kPerLane; ++u) {
    const float cosine = score_of(keys[u]);
    const bool clear = exact || (cosine >= novel + kMargin && (!p.refresh_on_hit || fabsf(cosine - matching) >= kMargin));
    unsure |= keys[u] == kNanKey || (keys[u] > kLowKey && !clear);
    near += keys[u] > kLowKey;
  }
  if (!exact && __reduce_add_sync(kAllLanes, near) > 1) {
#pragma unroll
    for (int u = 0; u <= kPerLane; ++u) {
      for (unsigned rest = __ballot_sync(kAllLanes, keys[u] > kLowKey); rest != 0; rest &= rest - 1) {
        const int lane = __ffs(rest) - 1;
        const float other = score_of(__shfl_sync(kAllLanes, keys[u], lane));
#pragma unroll
        for (int v = 0; v <= kPerLane; ++v) {
          const bool apart = (u == v && lane == lane_id()) || keys[v] <= kLowKey ||
                             fabsf(score_of(keys[v]) - other) >= 2.0f * kMargin;
          (u < kPerLane && v < kPerLane ? unsure : close) |= !apart;
        }
      }
    }
  }
  unsure = __any_sync(kAllLanes, unsure);
  close = __any_sync(kAllLanes, close);
  if (lane_id() == 0) {
    work.match[c] = {best, match.slot};
    work.met[c] = met;
    work.verdict[c] = unsure ? kUnsure : close ? kClose : kClear;
  }
}

__device__ inline NoveltyRule rule_of(const RouteExactBankParams& p) {
  return {p.slots, p.num_sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
}

template <class Shared>
__device__ bool decide_at_once(const RouteExactBankParams& p, const Shared& work, bool kept, int& slot, RouteAction& action) {
  const int lane = min(lane_id(), p.candidates - 1);
  const bool sure = kept && work.verdict[lane] < kUnsure &&
                    work.order[lane] + 1 > work.stamp[work.oldest[p.slots - p.num_sinks - 1]] >> kSlotBits;
  return route_at_once(rule_of(p), kept, sure, work.match[lane], work.met[lane], [&](int j) { return work.age[j]; },
                       [&](int place) { return work.oldest[place]; }, slot, action);
}

// The sequential rule. One warp.
template <class Shared>
__device__ RouteAction decide_in_order(const RouteExactBankParams& p, Shared& work, unsigned kept, int& slot) {
  SlotQueue queue;
#pragma unroll
  for (int u = 0; u < kPerLane; ++u) queue.stamp[u] = work.stamp[lane_id() + u * kWarp];
  const auto key = [&](int c, int column) { return work.key[min(c, p.candidates - 1)][column]; };
  return queue.route(
      rule_of(p), kept, work.match[min(lane_id(), p.candidates - 1)], [&](int i) { return work.order[i]; },
      [&](int c, int i) { return key(c, kMostSlots + i); }, key, work.filled, slot);
}

// Decides and writes, or returns the candidates whose cosines it needs in fixed order, in the first turn. One warp.
template <class Shared>
__device__ unsigned decide(const RouteExactBankParams& p, Shared& work, bool kept, uint32_t turn, uint64_t* arrived, int64_t b) {
  const auto unclear = [&](Verdict least) { return __ballot_sync(kAllLanes, kept && work.verdict[lane_id()] >= least); };
  int slot;
  RouteAction action;
  if (unclear(kUnsure) != 0 || !decide_at_once(p, work, kept, slot, action)) {
    const unsigned again = turn == 0 ? unclear(kClose) : 0;
    if (again != 0) return again;
    hopper::wait(arrived, turn);  // for keys as well
    action = decide_in_order(p, work, __ballot_sync(kAllLanes, kept), slot);
  }
  if (lane_id() < p.candidates) {
    p.slot[b * p.candidates + lane_id()] = slot;
    p.action[b * p.candidates + lane_id()] = action;
  }
  // The last candidate that touched a slot.
  const unsigned together = __match_any_sync(kAllLanes, slot);
  if (slot >= 0 && kWarp - 1 - __clz(together) == lane_id()) {
    p.new_last_touch[b * p.slots + slot] = work.time[kMostSlots + lane_id()];
  }
  return 0;
}

// ptxas moves the finding of addresses below the wait that follows, but for those on which a barrier depends.
template <class T, int N>
__device__ void hold(T* const (&found)[2][N]) {
  uintptr_t all = ~uintptr_t{0};
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) all &= reinterpret_cast<uintptr_t>(found[i / N][i % N]);
  __syncwarp(__all_sync(kAllLanes, all == ~uintptr_t{0}) ? __activemask() : kAllLanes);
}

// A cluster for each batch entry. A block compares some slots with all candidates, one warp a head, and sends the means to block
// 0, which decides: from cosines of the tensor cores if it can, else once more, from cosines in fixed order.
template <class T, int kDim, int kBatches>
__global__ void __launch_bounds__(kHeadThreads + kTimeThreads, 1) route_exact_bank_kernel(RouteExactBankParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ uint64_t arrived, told;
  using Shared = RouteShared<kDim, kBatches>;
  Shared& work = *reinterpret_cast<Shared*>(shared);
  const int blocks = blocks_of(p), rank = cluster_rank(), head = warp_id();
  const int64_t b = blockIdx.x / blocks;
  const int slot_groups = (p.slots + kSide - 1) / kSide, batches = (p.candidates + kSide - 1) / kSide;
  // With one batch of candidates their own cosines come along with those of slots; else they are further columns.
  const int groups = slot_groups + (kBatches == 1 ? 0 : batches);
  const int own_groups = (groups + blocks - 1) / blocks;  // block 0's; of the others it is sent the means
  const uint32_t bytes = batches * (groups - own_groups) * kPairs * sizeof(uint32_t);
  if (threadIdx.x == 0) {
    hopper::init_barrier(&arrived, 1);
    hopper::init_barrier(&told, 1);
    hopper::fence_barrier_init();
    if (rank == 0) hopper::arrive_expect(&arrived, bytes);
    hopper::arrive_expect(&told, sizeof(work.again));
    work.far = 0;
  }
  cluster_arrive();
  cluster_wait();  // other blocks must run before anything is sent to them
  // Where this lane's packets of the rows of a tile lie. Those of the first tile are found before the stream is waited for, and
  // come while the rest is found.
  const int64_t first_row = (b * p.kv_heads + min(head, p.kv_heads - 1)) * kDim;
  const T* const candidates = static_cast<const T*>(p.value) + first_row * p.candidates;
  const T* const slots = static_cast<const T*>(p.bank_value) + first_row * p.slots;
  constexpr int kPackets = kDim / kPacket, kRowsAtOnce = kWarp / kPackets, kCopies = kSide / kRowsAtOnce;
  const int row = lane_id() / kPackets, part = lane_id() % kPackets * kPacket;
  const T* from[2][kCopies];
  const auto find = [&](int group, int batch) {
    const bool of_slots = group < slot_groups;
    const T* columns = (of_slots ? slots : candidates) + part;
    const int first = (of_slots ? group : group - slot_groups) * kSide + row, last = (of_slots ? p.slots : p.candidates) - 1;
#pragma unroll
    for (int r = 0; r < kCopies; ++r) {
      from[0][r] = columns + min(first + r * kRowsAtOnce, last) * kDim;
      from[1][r] = candidates + part + min(batch * kSide + row + r * kRowsAtOnce, p.candidates - 1) * kDim;
    }
  };
  const auto copy = [&] {
#pragma unroll
    for (int r = 0; r < 2 * kCopies; ++r) {
      ampere::copy_packet(work.rows[head][r * kRowsAtOnce + row] + part, from[r / kCopies][r % kCopies], true);
    }
    ampere::commit_copies();
  };
  find(rank, 0);
  hold(from);
  wait_for_stream();
  let_next_start();
  if (head < p.kv_heads) copy();
  const bool of_head = head < kHeadWarps, decides = head == kHeadWarps;
  bool kept = false;
  if (!of_head) {
    if (rank != 0) return;
    kept = decides && p.slots != p.num_sinks && lane_id() < p.candidates &&
           read_double(p.gate, p.gate_dtype, b * p.candidates + lane_id()) >= p.tau_exact;
    order_slots(p, work, b);
  }
  const uint32_t barrier = remote_address(&arrived, 0);
  const float low = static_cast<float>(p.tau_novel) - kMargin, reciprocal = 1.0f / static_cast<float>(p.kv_heads);
  const auto compare_group = [&](int group, int batch, uint32_t again) {
    const bool exact = again != 0;
    const bool staged = exact && groups <= blocks && batches == 1;  // since the turn before
    if (head < p.kv_heads && !staged && (exact || group != rank || batch != 0)) {
      find(group, batch);
      copy();
    }
    const bool of_slots = group < slot_groups;
    const int pair = threadIdx.x;     // of this thread, if there are so many
    const bool own = pair >= kPairs;  // candidates with each other
    const int i = own ? pair / kSide - kSide : (of_slots ? group : group - slot_groups) * kSide + pair / kSide;
    const int c = batch * kSide + pair % kSide, pairs = kBatches == 1 && group == 0 ? 2 * kPairs : kPairs;
    const bool needed = pair < pairs && c < p.candidates && (own || !of_slots ? i < c : i < p.slots && p.used[b * p.slots + i]);
    if (!staged && head < p.kv_heads) {
      ampere::wait_copies<0>();
      __syncwarp();
      screen<T>(work, head);
    }
    hopper::sync_threads(kHeads, kHeadThreads);
    const auto mean = [&] { return head_mean(work.cosine[0] + pair, 2 * kPairs, p.kv_heads, reciprocal); };
    float cosine = 0.0f;
    bool low_exactly = false;
    if (pair < 2 * kPairs) cosine = mean();
    const bool near = needed && !(cosine < low && cosine > -2.0f);
    if (exact) {
      const bool asked = near && again >> c & 1;
      const unsigned bits = __ballot_sync(kAllLanes, asked);
      if (pair < 2 * kPairs && lane_id() == 0) work.near[head] = bits;
      hopper::sync_threads(kHeads, kHeadThreads);
      if (head < p.kv_heads) compare<T>(work, head);
      hopper::sync_threads(kHeads, kHeadThreads);
      if (asked) {
        cosine = mean();
        low_exactly = static_cast<double>(cosine) < p.tau_novel;
      }
    } else if (!(fabsf(cosine) < 2.0f)) {
      cosine = CUDART_NAN_F;
    }
    if (pair < pairs) {
      const int column = own || !of_slots ? kMostSlots + i : i;
      const uint32_t key = near && !low_exactly ? score_key(cosine) : needed ? kLowKey : 0;
      if (rank == 0) {
        work.key[c][column] = key;
      } else {
        send(remote_address(&work.key[c][column], 0), key, barrier);
      }
    }
  };
  const auto compare_all = [&](uint32_t again) {
    for (int group = rank; group < groups; group += blocks) {
      for (int batch = 0; batch < batches; ++batch) {
        compare_group(group, batch, again);
        if (group + blocks < groups || batch + 1 < batches) hopper::sync_threads(kHeads, kHeadThreads);
      }
    }
  };
  // compute-sanitizer counts the barriers that a warp has passed, and takes what others wrote after more of their own for
  // unordered: so those of the heads and the others pass as many.
  const int items = own_groups * batches;
  const auto pass = [&](int barriers) {
    for (int i = 0; i < barriers; ++i) hopper::sync_threads(kTimes, kTimeThreads);
  };
  // Once from the tensor cores and, if block 0 says so, once in fixed order.
#pragma unroll 1
  for (uint32_t turn = 0, again = 0; turn < 2; ++turn) {
    if (of_head) {
      hopper::sync_threads(kHeads, kHeadThreads);
      compare_all(again);
      if (rank == 0) {
        hopper::sync_threads(kHeads, kHeadThreads);
        hopper::wait(&arrived, turn);
        for (int c = head; c < p.candidates; c += kHeadWarps) judge(p, work, c, turn == 1);
      }
    } else {
      pass(turn == 0 ? 2 * items - 2 : 4 * items + 1);
    }
    if (rank == 0) __syncthreads();  // matches are there
    if (decides) {
      again = decide(p, work, kept, turn, &arrived, b);
      if (turn == 0) {
        if (lane_id() == 0) {
          work.again = again;
          if (again != 0) hopper::arrive_expect(&arrived, bytes);
        }
        __syncwarp();
        if (lane_id() > 0 && lane_id() < blocks) {
          send(remote_address(&work.again, lane_id()), again, remote_address(&told, lane_id()));
        }
      }
    }
    if (turn == 1) return;
    if (rank == 0) {
      __syncthreads();
    } else {
      hopper::wait(&told, 0);
    }
    again = work.again;
    if (again == 0) return;
  }
}

constexpr int kManyBatches = 4;  // 32 candidates

template <class T, int kDim, int kBatches>
cudaError_t run(const RouteExactBankParams& p, cudaStream_t stream) {
  return launch_clusters(route_exact_bank_kernel<T, kDim, kBatches>, p.batch, blocks_of(p), kHeadThreads + kTimeThreads,
                         sizeof(RouteShared<kDim, kBatches>), stream, p);
}

bool aligned(const void* rows) { return reinterpret_cast<uintptr_t>(rows) % 16 == 0; }

}  // namespace

bool serves(const RouteExactBankParams& p, DType dtype) {
  static_assert(sizeof(RouteShared<128, kManyBatches>) <= kClusterShared);
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (p.dim == 64 || p.dim == 128) && p.kv_heads >= 1 &&
         p.kv_heads <= kHeadWarps && p.candidates >= 1 && p.candidates <= kManyBatches * kSide && p.slots >= 1 &&
         p.slots <= kMostSlots && aligned(p.value) && aligned(p.bank_value);
}

cudaError_t route_exact_bank(const RouteExactBankParams& p, DType dtype, cudaStream_t stream) {
  const auto by_shape = [&](auto zero) {
    using T = decltype(zero);
    if (p.candidates <= kSide) return p.dim == 64 ? run<T, 64, 1>(p, stream) : run<T, 128, 1>(p, stream);
    return p.dim == 64 ? run<T, 64, kManyBatches>(p, stream) : run<T, 128, kManyBatches>(p, stream);
  };
  return dtype == DType::kBFloat16 ? by_shape(__nv_bfloat16{}) : by_shape(__half{});
}

}  // namespace coda::kernels::sm90
