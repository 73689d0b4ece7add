#include "../gates.cuh"
#include "../launch.h"
#include "cluster.cuh"
#include "routing.cuh"
#include "steps.h"

#include <algorithm>

namespace coda::kernels::sm90 {
namespace {

constexpr int kMaxWarps = 24;

// A tile is 8 candidates, one of kBatches batches, by 4 columns: first the slots, then, from column kSlots on, the candidates. Of
// a fixed size, so that addresses are constants.
template <int kDim, int kBatches>
struct alignas(16) RouteShared {
  static constexpr int kSlots = kPerLane * kWarp, kRows = kBatches * kTileRows, kSlotGroups = kSlots / kTileColumns;
  static constexpr int kGroups = kSlotGroups + kRows / kTileColumns;
  float row[kRows * kDim];  // the candidates of this head
  float norm[kRows];
  // The rest in block 0 alone.
  float cosine[kClusterBlocks][kBatches][kGroups * kTilePitch];  // what all heads sent
  uint32_t key[kRows][kGroups * kTileColumns + 1];               // of the means; of odd length: a column meets all banks
  Match match[kRows];                                            // best slot
  int filled[kWarp];
  bool used[kSlots];
  uint32_t order[kSlots + kRows];  // of these times:
  int64_t time[kSlots + kRows];    // last touch of the slots, then position of the candidates
};

// The mean cosines of one candidate, its best slot among them. One warp.
template <class Shared>
__device__ void score_candidate(const RouteExactBankParams& p, Shared& work, int c) {
  const float reciprocal = 1.0f / static_cast<float>(p.kv_heads);
  const float* sent = work.cosine[0][c / kTileRows] + c % kTileRows * kTileColumns;
  constexpr int stride = sizeof(work.cosine[0]) / sizeof(float);
  const auto key = [&](int column) {
    const float* from = sent + column / kTileColumns * kTilePitch + column % kTileColumns;
    return score_key(head_mean(from, stride, p.kv_heads, reciprocal));
  };
  if (lane_id() < p.candidates) work.key[c][Shared::kSlots + lane_id()] = key(Shared::kSlots + lane_id());
  const Match match = best_match(p.slots, [&](int j) { return work.key[c][j] = work.used[j] ? key(j) : 0; });
  if (lane_id() == 0) work.match[c] = match;
}

template <class Shared>
__device__ void decide(const RouteExactBankParams& p, Shared& work, double gate, int64_t b) {
  const NoveltyRule rule{p.slots, p.num_sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
  const unsigned kept =
      p.slots == p.num_sinks ? 0 : __ballot_sync(kAllLanes, lane_id() < p.candidates && gate >= p.tau_exact);
  SlotQueue queue;
  queue.load(p.slots, p.num_sinks, [&](int j) { return work.used[j]; }, [&](int j) { return work.order[j]; });
  int slot;
  const auto key = [&](int c, int column) { return work.key[min(c, p.candidates - 1)][column]; };
  const RouteAction action = queue.route(
      rule, kept, work.match[min(lane_id(), p.candidates - 1)], [&](int i) { return work.order[Shared::kSlots + i]; },
      [&](int c, int i) { return key(c, Shared::kSlots + i); }, key, work.filled, slot);
  if (lane_id() < p.candidates) {
    p.slot[b * p.candidates + lane_id()] = slot;
    p.action[b * p.candidates + lane_id()] = action;
  }
  // The last candidate that touched a slot.
  const unsigned together = __match_any_sync(kAllLanes, slot);
  if (slot >= 0 && kWarp - 1 - __clz(together) == lane_id()) work.time[slot] = work.time[Shared::kSlots + lane_id()];
  __syncwarp();
  for (int j = lane_id(); j < p.slots; j += kWarp) p.new_last_touch[b * p.slots + j] = work.time[j];
}

// One block for each head: its cosines go to block 0 of the cluster, which sums them in head order and decides.
template <class T, int kParts, int kBatches>
__global__ void __launch_bounds__(kMaxWarps * kWarp) route_exact_bank_kernel(RouteExactBankParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ uint64_t arrived;
  constexpr int dim = kParts * kWarp;
  const int head = cluster_rank();
  const int64_t b = blockIdx.x / p.kv_heads;
  using Shared = RouteShared<dim, kBatches>;
  Shared& work = *reinterpret_cast<Shared*>(shared);
  const int slot_groups = (p.slots + kTileColumns - 1) / kTileColumns, batches = (p.candidates + kTileRows - 1) / kTileRows;
  const int groups = slot_groups + (p.candidates + kTileColumns - 1) / kTileColumns;
  if (threadIdx.x == 0) {
    hopper::init_barrier(&arrived, 1);
    hopper::fence_barrier_init();
    if (head == 0) {
      hopper::arrive_expect(&arrived, static_cast<uint32_t>(p.kv_heads * batches * groups * kTile * sizeof(float)));
    }
  }
  cluster_arrive();
  const T* slot_values = static_cast<const T*>(p.bank_value) + (b * p.kv_heads + head) * p.slots * dim;
  const T* values = static_cast<const T*>(p.value) + (b * p.kv_heads + head) * p.candidates * dim;
  float column[kTileColumns][kParts];
  const auto load_slots = [&](int group) {
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
      load_lane_row(column[j], slot_values + static_cast<int64_t>(min(group * kTileColumns + j, p.slots - 1)) * dim);
    }
  };
  // Candidates lie as lanes read them: what one lane takes of a row is one word.
  using Staged = std::conditional_t<kParts == 4, float4, float2>;
  const auto staged = [&](int i) -> Staged& { return reinterpret_cast<Staged*>(work.row)[i * kWarp + lane_id()]; };
  const auto load_staged = [&](float(&to)[kParts], int i) { *reinterpret_cast<Staged*>(to) = staged(i); };
  // What block 0 decides by, underway with the rest: times by the last threads, one each, to whose warps no tiles fall.
  double gate = 0.0;
  const int last = static_cast<int>(blockDim.x - 1 - threadIdx.x);
  const bool has_time = head == 0 && last < p.slots + p.candidates;
  const int at = last < p.slots ? last : Shared::kSlots + last - p.slots;
  int64_t time = 0;
  bool used = false;
  if (has_time) {
    time = last < p.slots ? p.last_touch[b * p.slots + last] : p.position[b * p.candidates + last - p.slots];
    used = last < p.slots && p.used[b * p.slots + last];
  }
  if (head == 0 && warp_id() == 0 && lane_id() < p.candidates) {
    gate = read_double(p.gate, p.gate_dtype, b * p.candidates + lane_id());
  }
  int group = warp_id();
  if (group < slot_groups) load_slots(group);  // underway with the candidates
  for (int i = warp_count() - 1 - warp_id(); i < batches * kTileRows; i += warp_count()) {
    alignas(16) float mine[kParts];
    load_lane_row(mine, values + static_cast<int64_t>(min(i, p.candidates - 1)) * dim);
    staged(i) = *reinterpret_cast<const Staged*>(mine);
    const float norm = lane_norm(mine);
    if (lane_id() == 0) work.norm[i] = norm;
  }
  if (has_time) {
    work.time[at] = time;
    if (last < p.slots) work.used[at] = used;
  }
  __syncthreads();
  cluster_wait();  // other blocks must run before anything is sent to them
  if (has_time) {
    work.order[at] = order_among(work.time, p.slots, time) + order_among(work.time + Shared::kSlots, p.candidates, time);
  }
  const uint32_t to = remote_address(work.cosine[head][0] + lane_id(), 0), barrier = remote_address(&arrived, 0);
  for (; group < groups; group += warp_count()) {
    if (group >= slot_groups) {
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        load_staged(column[j], min((group - slot_groups) * kTileColumns + j, p.candidates - 1));
      }
    } else if (group != warp_id()) {
      load_slots(group);
    }
    const float norm = column_norm(column);
    for (int batch = 0; batch < batches; ++batch) {
      const float dot =
          tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_staged(to, batch * kTileRows + i); });
      const float cosine = div_rn(dot, mul_rn(work.norm[batch * kTileRows + lane_id() / kTileColumns], norm));
      const int tile = batch * Shared::kGroups + (group < slot_groups ? group : Shared::kSlotGroups + group - slot_groups);
      send(to + tile * kTilePitch * sizeof(float), cosine, barrier);
    }
  }
  if (head != 0) return;
  hopper::wait(&arrived, 0);
  for (int c = warp_id(); c < p.candidates; c += warp_count()) score_candidate(p, work, c);
  __syncthreads();
  if (warp_id() != 0) return;
  decide(p, work, gate, b);
}

constexpr int kManyBatches = 4;  // 32 candidates

template <class T, int kParts, int kBatches>
cudaError_t run(const RouteExactBankParams& p, cudaStream_t stream) {
  const int groups = (p.slots + kTileColumns - 1) / kTileColumns + (p.candidates + kTileColumns - 1) / kTileColumns;
  const int warps = std::min(groups + (p.slots + p.candidates + kWarp - 1) / kWarp, kMaxWarps);
  return launch_clusters(route_exact_bank_kernel<T, kParts, kBatches>, p.batch, p.kv_heads, warps * kWarp,
                         sizeof(RouteShared<kParts * kWarp, kBatches>), stream, p);
}

}  // namespace

bool serves(const RouteExactBankParams& p, DType dtype) {
  static_assert(sizeof(RouteShared<128, kManyBatches>) <= kClusterShared);
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (p.dim == 64 || p.dim == 128) && p.kv_heads >= 1 &&
         p.kv_heads <= kClusterBlocks && p.candidates >= 1 && p.candidates <= kManyBatches * kTileRows && p.slots >= 1 &&
         p.slots <= kPerLane * kWarp;
}

cudaError_t route_exact_bank(const RouteExactBankParams& p, DType dtype, cudaStream_t stream) {
  const auto by_shape = [&](auto zero) {
    using T = decltype(zero);
    if (p.candidates <= kTileRows) return p.dim == 64 ? run<T, 2, 1>(p, stream) : run<T, 4, 1>(p, stream);
    return p.dim == 64 ? run<T, 2, kManyBatches>(p, stream) : run<T, 4, kManyBatches>(p, stream);
  };
  return dtype == DType::kBFloat16 ? by_shape(__nv_bfloat16{}) : by_shape(__half{});
}

}  // namespace coda::kernels::sm90
