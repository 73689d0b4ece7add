#include <algorithm>

#include "../bank_scan/novelty.cuh"
#include "../bank_scan/retention.cuh"
#include "../bank_scan/summary.cuh"
#include "../common/launch.cuh"
#include "../common/rotation.cuh"
#include "steps.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;

// The eviction that the new token of one sequence brings about.
struct Eviction {
  int64_t n;
  int64_t begin;  // position of the first evicted token
  bool happens;
  int pinned;  // leading tokens that are sinks
  int ring0;   // ring slot of the first: the chunk divides the ring, so the others follow

  __device__ Eviction(const DecodeStepParams& p, int64_t sequence) : n(sequence) {
    const int64_t position = p.tokens_seen[n];
    begin = position - p.window;
    happens = begin >= 0 && position % p.chunk == 0;
    const int64_t sinks = p.num_sinks - begin;
    pinned = static_cast<int>(sinks < 0 ? 0 : sinks < p.chunk ? sinks : p.chunk);
    ring0 = static_cast<int>(position % p.window);
  }
};

template <class T>
struct Slots {
  using A = acc_t<T>;
  const DecodeStepParams& p;
  int64_t n;

  __device__ int64_t at(int head, int slot) const { return (n * p.kv_heads + head) * (p.window + p.exact_slots) + slot; }
  __device__ T* key(int head, int slot) const { return static_cast<T*>(p.state_k) + at(head, slot) * p.dim; }
  __device__ T* value(int head, int slot) const { return static_cast<T*>(p.state_v) + at(head, slot) * p.dim; }
  __device__ A& gate(int group, int slot) const {
    return static_cast<A*>(p.state_gate)[(n * p.gate_groups + group) * (p.window + p.exact_slots) + slot];
  }

  // One warp copies the token at `position` from its ring slot to exact slot j.
  __device__ void keep(int head, int group, int j, int ring_slot, int64_t position) const {
    T* to = key(head, p.window + j);
    const T* from = key(head, ring_slot);
    if (p.has_bank_distance) {
      turn_back_row(to, from, p.dim, position, p.inv_freq, p.rope_interleaved);
    } else {
      for (int d = lane_id(); d < p.dim; d += kWarp) to[d] = from[d];
    }
    for (int d = lane_id(); d < p.dim; d += kWarp) value(head, p.window + j)[d] = value(head, ring_slot)[d];
    if (lane_id() == 0 && (p.gate_groups > 1 || head == 0)) {
      gate(group, p.window + j) = gate(group, ring_slot);
      p.exact_pos[(n * p.gate_groups + group) * p.exact_slots + j] = position;
    }
  }
};

// One block for each sequence and gate group.
template <class T>
__global__ void __launch_bounds__(kThreads) retention_kernel(DecodeStepParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int group = static_cast<int>(blockIdx.x % p.gate_groups), slots = p.exact_slots, sinks = p.num_sinks;
  const Eviction evicted(p, blockIdx.x / p.gate_groups);
  if (!evicted.happens) return;
  Carver sizes(nullptr);
  RetentionBank(sizes, slots, p.chunk);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const RetentionBank bank(carver, slots, p.chunk);
  const Slots<T> state{p, evicted.n};
  const auto ring_slot = [&](int64_t position) { return static_cast<int>(evicted.ring0 + position - evicted.begin); };
  constexpr int stays = -1;
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    const int64_t position = p.exact_pos[(evicted.n * p.gate_groups + group) * slots + j];
    bank.position[j] = position;
    bank.source[j] = stays;
    bank.key[j] = retention_key(state.gate(group, p.window + j), p.age_decay, position);
  }
  rank_bank(bank, slots, sinks);
  for (int c = threadIdx.x; c < p.chunk; c += blockDim.x) {
    const int64_t position = evicted.begin + c;
    if (c < evicted.pinned) {
      bank.position[position] = position;
      bank.source[position] = ring_slot(position);
    } else {
      bank.offered[c - evicted.pinned] = retention_key(state.gate(group, ring_slot(position)), p.age_decay, position);
    }
  }
  const int inserted =
      offer_tokens(bank, slots, sinks, evicted.begin + evicted.pinned, p.chunk - evicted.pinned, ring_slot);
  const int group_heads = p.gate_groups == 1 ? p.kv_heads : 1;
  for (int item = warp_id(); item < slots * group_heads; item += warp_count()) {
    const int j = item / group_heads;
    if (bank.source[j] != stays) state.keep(group + item % group_heads, group, j, bank.source[j], bank.position[j]);
  }
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.counts + 2 * evicted.n),
              static_cast<unsigned long long>(evicted.pinned + inserted));
  }
}

template <class A>
struct NoveltyLayout {
  NoveltyBank<A> bank;
  int* candidate;  // (C) offsets among the evicted tokens

  __host__ __device__ NoveltyLayout(Carver& carver, const DecodeStepParams& p)
      : bank(carver, p.exact_slots, p.exact_candidates < p.chunk ? p.exact_candidates : p.chunk, p.kv_heads),
        candidate(carver.take<int>(p.chunk)) {}
};

// One block for each sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) novelty_kernel(DecodeStepParams p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int candidates;
  const int slots = p.exact_slots, sinks = p.num_sinks;
  const Eviction evicted(p, blockIdx.x);
  if (!evicted.happens) return;
  Carver sizes(nullptr);
  NoveltyLayout<A>(sizes, p);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const NoveltyLayout<A> work(carver, p);
  const auto& bank = work.bank;
  const Slots<T> state{p, evicted.n};
  int64_t* last_touch = p.last_touch + evicted.n * slots;

  for (int item = warp_id(); item < evicted.pinned * p.kv_heads; item += warp_count()) {
    const int c = item / p.kv_heads;
    const int64_t position = evicted.begin + c;
    state.keep(item % p.kv_heads, 0, static_cast<int>(position), evicted.ring0 + c, position);
    if (lane_id() == 0 && item % p.kv_heads == 0) last_touch[position] = position;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    bank.occupant[j] = p.exact_pos[evicted.n * slots + j] < 0 ? NoveltyBank<A>::kFree : NoveltyBank<A>::kHeld;
    bank.last_touch[j] = last_touch[j];
  }
  if (warp_id() == 0) {
    const auto logit = [&](int c) { return state.gate(0, evicted.ring0 + c); };
    // The highest gates above the threshold, ties to the earlier position.
    const int kept = slots == sinks ? 0 : compact(work.candidate, p.chunk, [&](int c) {
      const A mine = logit(c);
      if (c < evicted.pinned || !(static_cast<double>(mine) >= p.exact_threshold)) return false;
      int rank = 0;
      for (int other = evicted.pinned; other < p.chunk; ++other) {
        rank += logit(other) > mine || (logit(other) == mine && other < c);
      }
      return rank < p.exact_candidates;
    });
    if (lane_id() == 0) candidates = kept;
  }
  __syncthreads();
  const int kept = candidates;
  const auto slot_value = [&](int j, int h) -> const T* { return state.value(h, p.window + j); };
  const auto every = [](int) { return true; };
  row_norms(bank.slot_norm, slots, p.kv_heads, p.dim, [&](int j) { return bank.occupant[j] != NoveltyBank<A>::kFree; },
            slot_value, every);
  score_candidates(bank, slots, kept, p.kv_heads, p.dim, slot_value, [&](int k, int h) -> const T* {
    return state.value(h, evicted.ring0 + work.candidate[k]);
  });
  if (warp_id() == 0) {
    int64_t inserts = evicted.pinned, hits = 0;
    const NoveltyRule rule{slots, sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
    route_in_order(
        bank, rule, kept, [&](int k) { return evicted.begin + work.candidate[k]; },
        [&](int, int, RouteAction action) {
          if (action == kInsert) {
            ++inserts;
          } else {
            ++hits;
          }
        });
    if (lane_id() == 0) {
      p.counts[2 * evicted.n] += inserts;
      p.counts[2 * evicted.n + 1] += hits;
    }
  }
  __syncthreads();
  for (int item = warp_id(); item < slots * p.kv_heads; item += warp_count()) {
    const int j = item / p.kv_heads, occupant = bank.occupant[j];
    if (occupant < 0) continue;
    const int c = work.candidate[occupant];
    state.keep(item % p.kv_heads, 0, j, evicted.ring0 + c, evicted.begin + c);
  }
  for (int j = threadIdx.x; j < slots; j += blockDim.x) last_touch[j] = bank.last_touch[j];
}

// One block for each sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) summary_kernel(DecodeStepParams p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int slots = p.summary_slots;
  const Eviction evicted(p, blockIdx.x);
  if (!evicted.happens) return;
  Carver sizes(nullptr);
  SummaryBank<A>(sizes, slots, p.chunk, p.kv_heads);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const SummaryBank<A> bank(carver, slots, p.chunk, p.kv_heads);
  const Slots<T> state{p, evicted.n};
  const SummaryRule rule{slots, p.kv_heads, p.dim, p.summary_threshold, p.tau_spawn, p.low_freq_key, p.rope_interleaved};
  A* mass = static_cast<A*>(p.summary_mass) + evicted.n * slots;
  for (int j = threadIdx.x; j < slots; j += blockDim.x) bank.mass[j] = mass[j];
  const auto turned = [&](int c, int h) {
    return static_cast<T*>(p.bank_keys) + ((evicted.n * p.chunk + c) * p.kv_heads + h) * p.dim;
  };
  if (p.has_bank_distance) {
    for (int item = warp_id(); item < p.chunk * p.kv_heads; item += warp_count()) {
      const int c = item / p.kv_heads, h = item % p.kv_heads;
      turn_back_row(turned(c, h), state.key(h, evicted.ring0 + c), p.dim, evicted.begin + c, p.inv_freq,
                    p.rope_interleaved);
    }
  }
  const auto row = [&](void* rows) {
    return [&p, rows, n = evicted.n](int j, int h) {
      return static_cast<A*>(rows) + ((n * p.kv_heads + h) * p.summary_slots + j) * p.dim;
    };
  };
  summarise(
      bank, rule, static_cast<const A*>(p.eta_logit), evicted.pinned, p.chunk,
      [&](int c) { return state.gate(0, evicted.ring0 + c); },
      [&](int c, int h) { return p.has_bank_distance ? turned(c, h) : state.key(h, evicted.ring0 + c); },
      [&](int c, int h) { return state.value(h, evicted.ring0 + c); }, row(p.summary_k), row(p.summary_v),
      row(p.summary_k), row(p.summary_v), [](int, int) {});
  for (int j = threadIdx.x; j < slots; j += blockDim.x) mass[j] = bank.mass[j];
}

template <class A>
size_t exact_bytes(const DecodeStepParams& p) {
  Carver sizes(nullptr);
  if (p.novelty) {
    NoveltyLayout<A>(sizes, p);
  } else {
    RetentionBank(sizes, p.exact_slots, p.chunk);
  }
  return sizes.used();
}

template <class A>
size_t summary_bytes(const DecodeStepParams& p) {
  Carver sizes(nullptr);
  SummaryBank<A>(sizes, p.summary_slots, p.chunk, p.kv_heads);
  return sizes.used();
}

int64_t exact_blocks(const DecodeStepParams& p) { return p.sequences * p.gate_groups; }

template <class A>
size_t workspace_bytes(const DecodeStepParams& p) {
  // The two banks are updated one after the other and share it.
  const size_t exact = p.exact_slots > 0 ? workspace_part(exact_bytes<A>(p), exact_blocks(p)) : 0;
  const size_t summary = p.summary_slots > 0 ? workspace_part(summary_bytes<A>(p), p.sequences) : 0;
  return std::max(exact, summary);
}

}  // namespace

size_t decode_step_workspace(const DecodeStepParams& params, DType dtype) {
  return dtype == DType::kFloat64 ? workspace_bytes<double>(params) : workspace_bytes<float>(params);
}

cudaError_t update_banks(const DecodeStepParams& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    if (params.exact_slots > 0) {
      const auto kernel = params.novelty ? novelty_kernel<T> : retention_kernel<T>;
      const auto status = launch(kernel, dim3(static_cast<unsigned>(exact_blocks(params))), kThreads,
                                 shared_part(exact_bytes<A>(params)), stream, params);
      if (status != cudaSuccess) return status;
    }
    if (params.summary_slots == 0) return cudaSuccess;
    return launch(summary_kernel<T>, dim3(static_cast<unsigned>(params.sequences)), kThreads,
                  shared_part(summary_bytes<A>(params)), stream, params);
  });
}

cudaError_t decode_step(const DecodeStepParams& params, DType dtype, cudaStream_t stream) {
  for (const auto step : {update_banks, attend_memory, write_ring}) {
    if (const auto status = step(params, dtype, stream); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace coda::kernels
