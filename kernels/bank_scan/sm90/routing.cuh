#pragma once

#include "../novelty.cuh"
#include "dots.cuh"

namespace coda::kernels::sm90 {

constexpr int kPerLane = 4;  // slots of a lane, the most

// The sequential rule of novelty.cuh with the slots in the registers of one warp: slot lane + 32 u is the lane's u-th.
struct SlotRegisters {
  static constexpr int kFree = -2, kHeld = -1;
  int occupant[kPerLane];      // kFree, kHeld or a candidate of this batch
  uint64_t touched[kPerLane];  // last_touch, ordered as unsigned
  int first;                   // the lowest slot in use

  static __device__ uint64_t ordered(int64_t touch) { return static_cast<uint64_t>(touch) ^ (uint64_t{1} << 63); }
  static __device__ int slot_of(int u) { return lane_id() + u * kWarp; }

  // used(j) and last_touch(j) of the slots before the batch.
  template <class Used, class Touch>
  __device__ void load(int slots, Used used, Touch last_touch) {
    first = slots;
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      const int j = slot_of(u);
      occupant[u] = j < slots && used(j) ? kHeld : kFree;
      touched[u] = j < slots ? ordered(last_touch(j)) : 0;
      if (occupant[u] == kHeld && j < first) first = j;
    }
    first = __reduce_min_sync(kAllLanes, first);
  }
  __device__ int64_t last_touch(int u) const { return static_cast<int64_t>(touched[u] ^ (uint64_t{1} << 63)); }

  // score(j) of a candidate against what slot j held before the batch, gram(i) against candidate i. Every lane gets the same slot.
  template <class Score, class Gram>
  __device__ RouteAction route(const NoveltyRule& rule, float tau_novel, float tau_match, int candidate, int64_t position, Score score,
                               Gram gram, int& slot) {
    uint32_t key[kPerLane], best = 0;
    uint64_t age[kPerLane], oldest = ~uint64_t{0};
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      if (u * kWarp >= rule.slots) break;
      const int j = slot_of(u);
      key[u] = 0;
      if (occupant[u] != kFree) {
        const float here = occupant[u] < 0 ? score(j) : gram(occupant[u]);
        // A sequential search that begins with NaN keeps it: nothing is greater.
        key[u] = here == here || j != first ? score_key(here) : ~0u;
      }
      best = max(best, key[u]);
      age[u] = occupant[u] == kFree ? 0 : touched[u];  // free slots count as touched before anything else
      if (j >= rule.sinks && j < rule.slots) oldest = min(oldest, age[u]);
    }
    best = __reduce_max_sync(kAllLanes, best);
    const uint32_t high = __reduce_min_sync(kAllLanes, static_cast<uint32_t>(oldest >> 32));
    const uint32_t low =
        __reduce_min_sync(kAllLanes, static_cast<uint32_t>(oldest >> 32) == high ? static_cast<uint32_t>(oldest) : ~0u);
    oldest = static_cast<uint64_t>(high) << 32 | low;
    int match = 0, victim = 0;
#pragma unroll
    for (int u = kPerLane - 1; u >= 0; --u) {
      if (u * kWarp >= rule.slots) continue;
      const int j = slot_of(u);
      const unsigned matches = __ballot_sync(kAllLanes, key[u] == best);
      const unsigned victims = __ballot_sync(kAllLanes, age[u] == oldest && j >= rule.sinks && j < rule.slots);
      if (matches) match = u * kWarp + __ffs(matches) - 1;
      if (victims) victim = u * kWarp + __ffs(victims) - 1;
    }
    const float similarity = key_score(best);
    const bool known = best != 0 && !(similarity < tau_novel);
    slot = known ? match : victim;
    const RouteAction action = !known                                                                        ? kInsert
                               : rule.refresh_on_hit && similarity >= tau_match && match >= rule.sinks ? kRefresh
                                                                                                            : kTouch;
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      if (slot_of(u) != slot) continue;
      touched[u] = ordered(position);
      if (action != kTouch) occupant[u] = candidate;
    }
    if (action != kTouch) first = min(first, slot);
    return action;
  }
};

// The least float that is not below: x < tau in float64 and x < float_threshold(tau) are the same for every float x.
__device__ inline float float_threshold(double tau) { return __double2float_ru(tau); }

}  // namespace coda::kernels::sm90
