#pragma once

#include "../novelty.cuh"
#include "dots.cuh"

// The rule of novelty.cuh for a batch of at most 32 candidates, with as little as possible in its sequential part: the best slot
// of each candidate is found ahead, in parallel, scores are compared as integers, and times of last touch are replaced by their
// order.
namespace coda::kernels::sm90 {

constexpr int kPerLane = 4;  // slots of a lane, the most: lane + 32 u
constexpr int kSlotBits = 7;
constexpr unsigned kSlotMask = (1u << kSlotBits) - 1;

// Where a cluster's blocks keep the cosines of a tile that they sent: tiles lie so far apart that a warp which reads a
// candidate's cosines with 32 slots meets all banks.
constexpr int kTilePitch = kTile + kTileColumns;

// Scores as integers that order like them; 0 stands for no score, NaN is less than any number.
constexpr uint32_t kNanKey = 1;
__device__ inline uint32_t score_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // one zero
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return score == score ? key : kNanKey;
}
__device__ inline float score_of(uint32_t key) {
  return __uint_as_float(key ^ ((key & 0x80000000u) != 0 ? 0x80000000u : ~0u));
}
// The least float that is not below tau: x < tau in float64 and x < float_threshold(tau) are the same for every float x.
__device__ inline float float_threshold(double tau) { return __double2float_ru(tau); }

// Keys from which on a score is that of something known, and one that may refresh.
__device__ inline uint32_t novel_key(const NoveltyRule& rule) { return score_key(float_threshold(rule.tau_novel)); }
__device__ inline uint32_t matching_key(const NoveltyRule& rule) {
  return rule.tau_match == rule.tau_match ? score_key(float_threshold(rule.tau_match)) : ~0u;
}

// x / n in three steps, n with its reciprocal; the same bits while nothing leaves the range of normal numbers.
__device__ inline float quotient(float x, float n, float reciprocal) {
  const float near = mul_rn(x, reciprocal);
  return __fmaf_rn(__fmaf_rn(-near, n, x), reciprocal, near);
}

// The mean of what at most 8 heads sent, `stride` floats apart, summed in head order.
__device__ inline float head_mean(const float* sent, int stride, int heads, float reciprocal) {
  float total = 0.0f;
#pragma unroll
  for (int h = 0; h < 8; ++h) {
    const float mine = sent[min(h, heads - 1) * stride];  // without a branch, so that all are read at once
    total = add_rn(total, h < heads ? mine : 0.0f);
  }
  return quotient(total, static_cast<float>(heads), reciprocal);
}

// How many of the values are less. Equal ones get the same order.
__device__ inline uint32_t order_among(const int64_t* values, int count, int64_t mine) {
  uint32_t less = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) less += values[i] < mine;
  return less;
}

struct Match {
  uint32_t key;  // of the score, 0 without
  int slot;
};

// The best slot of one candidate, ties to the lowest, in every lane. key(j) of slot j, 0 where free. One warp.
template <class Key>
__device__ inline Match best_match(int slots, Key key) {
  uint32_t best = 0;
  int slot = slots;
#pragma unroll 1
  for (int j = lane_id(); j < slots; j += kWarp) {
    const uint32_t here = key(j);
    if (here > best) {
      best = here;
      slot = j;
    }
  }
  const uint32_t top = __reduce_max_sync(kAllLanes, best);
  return {top, __reduce_min_sync(kAllLanes, best == top ? slot : slots)};
}

constexpr int kStale = 1 << 8;  // mark of a best slot that was overwritten

// Slot `to` was filled by what scores `met`: it may be the best now, or have been. A stale match keeps its key, which nothing
// else exceeds.
__device__ inline void meet(Match& match, uint32_t met, int to) {
  const int mine = match.slot & (kStale - 1);
  if (met > match.key || (met == match.key && to <= mine)) {
    match = {met, to};
  } else if (to == mine) {
    match.slot |= kStale;
  }
}

// Decides all candidates at once; false if the sequential rule might do otherwise. Lane c brings of candidate c whether there is
// one, whether what follows is known for sure, the key and the slot of its best match, no slot if none is near, and which of the
// earlier candidates are near. age(j) is the place of slot j in the order of the last touches, oldest(place) the slot there; sinks
// have none, kSinkAge. Candidates are younger than all slots. One warp.
//
// New ones, to which no slot and no new one before them is near, take the oldest slots that no other has found; the others touch
// what is near. So it is if no slot would have been taken before it was found, what is refreshed is near to no later candidate,
// and none has a slot and a new one, or two new ones, to choose between.
constexpr int kSinkAge = 1 << kSlotBits;
template <class Age, class Oldest>
__device__ bool route_at_once(const NoveltyRule& rule, bool kept, bool sure, Match best, unsigned met, Age age, Oldest oldest,
                              int& slot, RouteAction& action) {
  const bool matched = kept && best.slot < rule.slots;
  const unsigned earlier = (1u << lane_id()) - 1;
  if (!kept) met = 0;
  const unsigned unmatched = __ballot_sync(kAllLanes, kept && !matched);
  unsigned all_fresh = unmatched;
  bool fresh = kept && !matched;
  if (__any_sync(kAllLanes, met != 0)) {
    for (unsigned before = 0; before != all_fresh;) {
      before = all_fresh;
      fresh = kept && !matched && (met & before) == 0;
      all_fresh = __ballot_sync(kAllLanes, fresh);
    }
  }
  int place = __popc(all_fresh & earlier) - !fresh;
  const unsigned follows = met & all_fresh;
  if (all_fresh != __ballot_sync(kAllLanes, kept)) {
    const bool refreshes = matched && rule.refresh_on_hit && best.slot >= rule.sinks && best.key >= matching_key(rule);
    const unsigned all_refresh = __ballot_sync(kAllLanes, refreshes);
    const unsigned together = __match_any_sync(kAllLanes, matched ? best.slot : -1);
    const int found_at = matched ? age(best.slot) : kSinkAge;
    // Of the 32 oldest slots, those that are found: 32 candidates get no further.
    const unsigned found = __reduce_or_sync(kAllLanes, found_at < kWarp ? 1u << found_at : 0u);
    // The place of the slot that this candidate takes, or else the last new one before it: of the others, the nth.
    const int nth = place;
    for (int next; place >= 0 && (next = nth + __popc(found & ((2u << place) - 1))) != place;) place = next;
    sure = sure && (follows & (follows - 1)) == 0 && !(matched && follows != 0) && !(rule.refresh_on_hit && follows != 0) &&
           found_at > place && (met & all_refresh) == 0 && !(matched && (together & all_refresh & earlier) != 0);
    action = refreshes ? kRefresh : kTouch;
  }
  if (!__all_sync(kAllLanes, !kept || (sure && (!fresh || place < rule.slots - rule.sinks)))) return false;
  const int taken = fresh ? oldest(place) : -1, followed = __shfl_sync(kAllLanes, taken, __ffs(follows) - 1);
  if (!kept || fresh) action = kept ? kInsert : kSkip;
  slot = !kept ? -1 : fresh ? taken : matched ? best.slot : followed;
  return true;
}

// The order in which slots were last touched, and the sequential rule; in the registers of one warp.
struct SlotQueue {
  uint32_t stamp[kPerLane];  // order of the last touch, then slot; free ones first, sinks and what is no slot never

  // used(j) and order(j) of slot j.
  template <class Used, class Order>
  __device__ void load(int slots, int sinks, Used used, Order order) {
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      const int j = lane_id() + u * kWarp;
      stamp[u] = j < sinks || j >= slots ? ~0u : j;
      if (stamp[u] != ~0u && used(j)) stamp[u] |= (order(j) + 1) << kSlotBits;
    }
  }

  // Routes the candidates of the mask in order. Lane c brings the best match of candidate c. order(i) is that of the position of
  // candidate i, gram(c, i) the key of the cosine of candidates c and i, key(c, j) that of candidate c with what slot j held
  // before, or holds, where put(j, met) in lane c takes note that it compares so with what fills slot j. Leaves the slot that
  // candidate i filled, -1 if none, in filled[i], and returns slot and action of candidate c in lane c.
  struct NoNotes {
    __device__ void operator()(int, uint32_t) const {}
  };
  template <class Order, class Gram, class Key, class Put = NoNotes>
  __device__ RouteAction route(const NoveltyRule& rule, unsigned candidates, Match match, Order order, Gram gram, Key key,
                               int* filled, int& slot, Put put = {}) {
    const uint32_t novel = novel_key(rule), matching = matching_key(rule);
    RouteAction action = kSkip;
    slot = -1;
#pragma unroll 1
    for (int i = 0; candidates != 0; ++i, candidates >>= 1) {
      const uint32_t met = gram(lane_id(), i), touched = (order(i) + 1) << kSlotBits;
      const uint32_t oldest = __reduce_min_sync(kAllLanes, min(min(stamp[0], stamp[1]), min(stamp[2], stamp[3])));
      uint32_t best = __shfl_sync(kAllLanes, match.key, i);
      int found = __shfl_sync(kAllLanes, match.slot, i);
      const bool routed = candidates & 1;
      if (found >= kStale && routed) {
        __syncwarp();
        const Match again = best_match(rule.slots, [&](int j) {
          uint32_t now = key(i, j);
          if constexpr (std::is_same_v<Put, NoNotes>) {
#pragma unroll 1
            for (int c = 0; c < i; ++c) now = filled[c] == j ? gram(i, c) : now;
          }
          return now;
        });
        __syncwarp();  // before notes are taken
        best = again.key;
        found = again.slot;
      }
      const bool known = best >= novel || best == kNanKey;
      const bool refreshes = known && rule.refresh_on_hit && best >= matching && found >= rule.sinks;
      const bool fills = routed && (!known || refreshes);
      const int to = !routed ? -1 : known ? found : static_cast<int>(oldest & kSlotMask);
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        if (to == lane_id() + u * kWarp && to >= rule.sinks) stamp[u] = touched | to;
      }
      if (lane_id() == i) {
        filled[i] = fills ? to : -1;
        slot = to;
        action = !routed ? kSkip : !known ? kInsert : refreshes ? kRefresh : kTouch;
      }
      if (fills) {
        meet(match, met, to);
        put(to, met);
      }
    }
    return action;
  }
};

}  // namespace coda::kernels::sm90
