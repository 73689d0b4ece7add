#pragma once

#include "../common/similarity.cuh"
#include "../common/workspace.cuh"

namespace coda::kernels {

// How far a slot moves towards candidates whose gates add up to `mass`: 1 - (1 - eta)^mass, log_stay the binary logarithm of
// 1 - eta.
template <class A>
__device__ inline A ema_rate(A log_stay, A mass) {
  return A(1) - exp2(log_stay * mass);
}

struct SummaryRule {
  int slots, heads, dim;
  double threshold;  // least gate logit
  double tau_spawn;
  bool low_freq_key, interleaved;

  // Whether dimension d belongs to the slower half of the RoPE pairs.
  __device__ bool slow(int d) const { return (interleaved ? d / 2 : d % (dim / 2)) >= dim / 4; }
  // What a key keeps under low_freq_key: its slow dimensions, times this.
  template <class A>
  __device__ A key_factor(int d) const {
    if (!low_freq_key) return A(1);
    return slow(d) ? sqrt(static_cast<A>(dim) / (2 * (dim / 2 - dim / 4))) : A(0);
  }
};

template <class A>
struct SummaryBank {
  A* mass;            // (Ms) 0 free
  int* claim;         // (Ms) candidate that claimed the slot in this chunk, -1 none
  int* first_member;  // (Ms) candidate, -1 none
  int* last_member;   // (Ms)
  A* member_mass;     // (Ms)
  A* slot_norm;       // (Ms, Hkv)
  int* candidate;     // (C) offset of each candidate among the evicted tokens
  int* next_member;   // (C)
  A* gate;            // (C) sigmoid of the logit
  A* candidate_norm;  // (C, Hkv)
  A* score;           // (C, Ms)
  A* gram;            // (C, C)

  __host__ __device__ SummaryBank(Carver& carver, int slots, int chunk, int heads)
      : mass(carver.take<A>(slots)), claim(carver.take<int>(slots)), first_member(carver.take<int>(slots)),
        last_member(carver.take<int>(slots)), member_mass(carver.take<A>(slots)),
        slot_norm(carver.take<A>(int64_t{slots} * heads)), candidate(carver.take<int>(chunk)),
        next_member(carver.take<int>(chunk)), gate(carver.take<A>(chunk)),
        candidate_norm(carver.take<A>(int64_t{chunk} * heads)), score(carver.take<A>(int64_t{chunk} * slots)),
        gram(carver.take<A>(int64_t{chunk} * chunk)) {}
};

// One chunk of the EMA prototypes (semantics 3.5), the whole block. Evicted tokens are offsets [skip, count): logit(c), key(c, h) as
// the bank holds it, value(c, h). before_k(j, h) ... after_v(j, h) are the slots' rows, which may be the same memory; bank.mass is
// updated in place; assign(c, slot) is called once for every token that went to a slot. Ends with a barrier.
template <class A, class Logit, class Key, class Value, class BeforeK, class BeforeV, class AfterK, class AfterV, class Assign>
__device__ inline void summarise(const SummaryBank<A>& bank, const SummaryRule& rule, const A* eta_logit, int skip, int count,
                                 Logit logit, Key key, Value value, BeforeK before_k, BeforeV before_v, AfterK after_k,
                                 AfterV after_v, Assign assign) {
  __shared__ int candidates, free_slots;
  const int slots = rule.slots, heads = rule.heads, dim = rule.dim;
  __syncthreads();
  for (int j = threadIdx.x; j < slots; j += blockDim.x) bank.claim[j] = bank.first_member[j] = -1;
  if (warp_id() == 0) {
    const int kept = compact(bank.candidate, count - skip, [&](int c) {
      return static_cast<double>(logit(skip + c)) >= rule.threshold;
    });
    int free = 0;
    for (int j = lane_id(); j < slots; j += kWarp) free += !(bank.mass[j] > A(0));
    free = __reduce_add_sync(kAllLanes, free);
    if (lane_id() == 0) {
      candidates = kept;
      free_slots = free;
    }
  }
  __syncthreads();
  const int kept = candidates;
  const auto held = [&](int j) { return bank.mass[j] > A(0); };
  const auto token = [&](int i) { return skip + bank.candidate[i]; };
  const auto all = [](int) { return true; };
  const auto slow = [&](int d) { return rule.slow(d); };
  const auto score = [&](auto slot_row, auto candidate_row, auto keep) {
    row_norms(bank.slot_norm, slots, heads, dim, held, slot_row, keep);
    row_norms(bank.candidate_norm, kept, heads, dim, all, candidate_row, keep);
    __syncthreads();
    mean_cosines(bank.score, kept, slots, heads, dim, bank.candidate_norm, bank.slot_norm, [&](int, int j) { return held(j); },
                 candidate_row, slot_row, keep);
    // Candidates are compared with each other only where one of them may claim a slot.
    if (free_slots > 0) {
      mean_cosines(bank.gram, kept, kept, heads, dim, bank.candidate_norm, bank.candidate_norm,
                   [](int i, int j) { return j < i; }, candidate_row, candidate_row, keep);
    }
    __syncthreads();
  };
  if (rule.low_freq_key) {
    score(before_k, [&](int i, int h) { return key(token(i), h); }, slow);
  } else {
    score(before_v, [&](int i, int h) { return value(token(i), h); }, all);
  }
  if (warp_id() == 0) {
    for (int i = 0; i < kept; ++i) {
      Best<A> best{A(0), -1};
      int free = slots;
      for (int j = lane_id(); j < slots; j += kWarp) {
        const int claim = bank.claim[j];
        if (claim < 0 && !held(j)) {
          free = min(free, j);
          continue;
        }
        const Best<A> here{claim < 0 ? bank.score[i * slots + j] : bank.gram[i * kept + claim], j};
        if (better(here, best)) best = here;
      }
      best = warp_best(best);
      free = warp_min(free);
      const bool claims = free < slots && (best.index < 0 || static_cast<double>(best.score) < rule.tau_spawn);
      const int slot = claims ? free : best.index;
      __syncwarp();
      if (lane_id() == 0) {
        const A gate = sigmoid(static_cast<A>(logit(token(i))));
        bank.gate[i] = gate;
        bank.next_member[i] = -1;
        if (claims) bank.claim[slot] = i;
        if (bank.first_member[slot] < 0) {
          bank.first_member[slot] = i;
          bank.member_mass[slot] = gate;
        } else {
          bank.next_member[bank.last_member[slot]] = i;
          bank.member_mass[slot] += gate;
        }
        bank.last_member[slot] = i;
        assign(token(i), slot);
      }
      __syncwarp();
    }
  }
  __syncthreads();
  for (int item = warp_id(); item < heads * slots; item += warp_count()) {
    const int h = item / slots, j = item % slots;
    const auto *old_k = before_k(j, h), *old_v = before_v(j, h);
    A *new_k = after_k(j, h), *new_v = after_v(j, h);
    const bool used = held(j), met = bank.first_member[j] >= 0;
    const A mass = met ? bank.member_mass[j] : A(1);
    const A rate = met && used ? ema_rate(log2(sigmoid(-eta_logit[h])), mass) : A(1);
    for (int d = lane_id(); d < dim; d += kWarp) {
      A mean_k = A(0), mean_v = A(0);
      for (int i = bank.first_member[j]; i >= 0; i = bank.next_member[i]) {
        mean_k += bank.gate[i] * static_cast<A>(widen(key(token(i), h)[d]));
        mean_v += bank.gate[i] * static_cast<A>(widen(value(token(i), h)[d]));
      }
      mean_k *= rule.key_factor<A>(d) / mass;
      mean_v /= mass;
      const A k = used ? old_k[d] : A(0), v = used ? old_v[d] : A(0);
      new_k[d] = met ? (used ? k + rate * (mean_k - k) : mean_k) : k;
      new_v[d] = met ? (used ? v + rate * (mean_v - v) : mean_v) : v;
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    if (bank.first_member[j] >= 0) bank.mass[j] = held(j) ? bank.mass[j] + bank.member_mass[j] : bank.member_mass[j];
  }
  __syncthreads();
}

}  // namespace coda::kernels
