#pragma once

#include "../common/similarity.cuh"
#include "../common/workspace.cuh"

namespace coda::kernels {

enum RouteAction { kSkip = 0, kInsert = 1, kTouch = 2, kRefresh = 3 };

struct NoveltyRule {
  int slots, sinks;
  double tau_novel, tau_match;
  bool refresh_on_hit;
};

// Routing of one batch of candidates (semantics 3.4).
template <class A>
struct NoveltyBank {
  static constexpr int kFree = -2, kHeld = -1;
  int* occupant;        // (Me) kFree, kHeld: what the slot held before this batch, or the index of a candidate
  int64_t* last_touch;  // (Me)
  A* slot_norm;         // (Me, Hkv)
  A* candidate_norm;    // (candidates, Hkv)
  A* score;             // (candidates, Me)
  A* gram;              // (candidates, candidates)

  __host__ __device__ NoveltyBank(Carver& carver, int slots, int candidates, int heads)
      : occupant(carver.take<int>(slots)), last_touch(carver.take<int64_t>(slots)),
        slot_norm(carver.take<A>(int64_t{slots} * heads)), candidate_norm(carver.take<A>(int64_t{candidates} * heads)),
        score(carver.take<A>(int64_t{candidates} * slots)), gram(carver.take<A>(int64_t{candidates} * candidates)) {}
};

// Scores `count` candidates against the slots in use and each other; norms of the slots in use must be there. The whole block;
// ends with a barrier.
template <class A, class SlotRow, class CandidateRow>
__device__ inline void score_candidates(const NoveltyBank<A>& bank, int slots, int count, int heads, int dim, SlotRow slot_row,
                                        CandidateRow candidate_row) {
  const auto all = [](int) { return true; };
  row_norms(bank.candidate_norm, count, heads, dim, all, candidate_row, all);
  __syncthreads();
  mean_cosines(bank.score, count, slots, heads, dim, bank.candidate_norm, bank.slot_norm,
               [&](int, int j) { return bank.occupant[j] != NoveltyBank<A>::kFree; }, candidate_row, slot_row, all);
  mean_cosines(bank.gram, count, count, heads, dim, bank.candidate_norm, bank.candidate_norm,
               [](int i, int j) { return j < i; }, candidate_row, candidate_row, all);
  __syncthreads();
}

// The sequential rule, in one warp: every candidate sees the inserts of those before it. position(i) is a candidate's position;
// emit(i, slot, action) is called by every lane.
template <class A, class Position, class Emit>
__device__ inline void route_in_order(const NoveltyBank<A>& bank, const NoveltyRule& rule, int count, Position position,
                                      Emit emit) {
  constexpr int64_t never = INT64_MAX;
  for (int i = 0; i < count; ++i) {
    Best<A> best{A(0), -1};
    for (int j = lane_id(); j < rule.slots; j += kWarp) {
      const int occupant = bank.occupant[j];
      if (occupant == NoveltyBank<A>::kFree) continue;
      const Best<A> here{occupant < 0 ? bank.score[i * rule.slots + j] : bank.gram[i * count + occupant], j};
      if (better(here, best)) best = here;
    }
    best = warp_best(best);
    int slot = best.index;
    RouteAction action = kTouch;
    if (slot < 0 || static_cast<double>(best.score) < rule.tau_novel) {
      // Free slots count as touched before anything else, the lowest first.
      int64_t oldest = never;
      int victim = rule.slots;
      for (int j = rule.sinks + lane_id(); j < rule.slots; j += kWarp) {
        const int64_t touched = bank.occupant[j] == NoveltyBank<A>::kFree ? INT64_MIN : bank.last_touch[j];
        if (victim == rule.slots || touched < oldest) {
          oldest = touched;
          victim = j;
        }
      }
      const int64_t least = warp_min(oldest);
      slot = warp_min(oldest == least ? victim : rule.slots);
      action = kInsert;
    } else if (rule.refresh_on_hit && static_cast<double>(best.score) >= rule.tau_match && slot >= rule.sinks) {
      action = kRefresh;
    }
    __syncwarp();
    if (lane_id() == 0) {
      bank.last_touch[slot] = position(i);
      if (action != kTouch) bank.occupant[slot] = i;
    }
    emit(i, slot, action);
    __syncwarp();
  }
}

}  // namespace coda::kernels
