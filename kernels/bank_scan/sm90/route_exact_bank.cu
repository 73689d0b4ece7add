#include "../../common/workspace.cuh"
#include "../launch.h"
#include "cluster.cuh"
#include "routing.cuh"
#include "steps.h"

#include <algorithm>

namespace coda::kernels::sm90 {
namespace {

constexpr int kMaxWarps = 20;

// Columns are slots, then candidates, each to a multiple of 4. A tile is 8 candidates by 4 columns.
struct Tiles {
  int slot_groups, groups, batches;

  __host__ __device__ explicit Tiles(const RouteExactBankParams& p)
      : slot_groups((p.slots + kTileColumns - 1) / kTileColumns),
        groups(slot_groups + (p.candidates + kTileColumns - 1) / kTileColumns),
        batches((p.candidates + kTileRows - 1) / kTileRows) {}
  __host__ __device__ int numbers() const { return groups * batches * kTile; }
};

struct Layout {
  float* row;       // (T, D) the candidates of this head
  float* norm;      // (T)
  float* cosine;    // (Hkv, numbers) block 0: what all heads sent
  float* score;     // (T, columns)

  __host__ __device__ Layout(Carver& carver, const RouteExactBankParams& p, const Tiles& tiles)
      : row(carver.take<float>(int64_t{tiles.batches} * kTileRows * p.dim)), norm(carver.take<float>(tiles.batches * kTileRows)),
        cosine(carver.take<float>(int64_t{p.kv_heads} * tiles.numbers())), score(carver.take<float>(tiles.numbers())) {}
};

size_t layout_bytes(const RouteExactBankParams& p) {
  Carver sizes(nullptr);
  Layout(sizes, p, Tiles(p));
  return sizes.used();
}

__device__ void decide(const RouteExactBankParams& p, const Layout& work, const Tiles& tiles, SlotRegisters& bank,
                       double gate, int64_t position, int64_t b) {
  const NoveltyRule rule{p.slots, p.num_sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
  const float tau_novel = float_threshold(p.tau_novel), tau_match = float_threshold(p.tau_match);
  unsigned kept = p.slots == p.num_sinks ? 0 : __ballot_sync(kAllLanes, lane_id() < p.candidates && gate >= p.tau_exact);
  int64_t my_slot = -1, my_action = kSkip;
  while (kept) {
    const int i = __ffs(kept) - 1;
    kept &= kept - 1;
    const float* scores = work.score + i * tiles.groups * kTileColumns;
    int slot;
    const RouteAction action = bank.route(
        rule, tau_novel, tau_match, i, __shfl_sync(kAllLanes, position, i), [&](int j) { return scores[j]; },
        [&](int other) { return scores[tiles.slot_groups * kTileColumns + other]; }, slot);
    if (lane_id() == i) {
      my_slot = slot;
      my_action = action;
    }
  }
  if (lane_id() < p.candidates) {
    p.slot[b * p.candidates + lane_id()] = my_slot;
    p.action[b * p.candidates + lane_id()] = my_action;
  }
#pragma unroll
  for (int u = 0; u < kPerLane; ++u) {
    const int j = bank.slot_of(u);
    if (j < p.slots) p.new_last_touch[b * p.slots + j] = bank.last_touch(u);
  }
}

// One block for each head: its cosines go to block 0 of the cluster, which sums them in head order and decides.
template <class T, int kParts>
__global__ void __launch_bounds__(kMaxWarps * kWarp) route_exact_bank_kernel(RouteExactBankParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ uint64_t arrived;
  constexpr int dim = kParts * kWarp;
  const int head = cluster_rank();
  const int64_t b = blockIdx.x / p.kv_heads;
  const Tiles tiles(p);
  Carver carver(shared);
  const Layout work(carver, p, tiles);
  if (threadIdx.x == 0) {
    hopper::init_barrier(&arrived, 1);
    hopper::fence_barrier_init();
  }
  __syncthreads();
  cluster_arrive();

  SlotRegisters bank;
  const bool decides = head == 0 && warp_id() == 0;
  double gate = 0.0;
  int64_t position = 0;
  if (decides) {
    bank.load(p.slots, [&](int j) { return p.used[b * p.slots + j]; }, [&](int j) { return p.last_touch[b * p.slots + j]; });
    if (lane_id() < p.candidates) {
      gate = p.gate[b * p.candidates + lane_id()];
      position = p.position[b * p.candidates + lane_id()];
    }
  }
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
  int group = warp_id();
  if (group < tiles.slot_groups) load_slots(group);  // underway with the candidates
  for (int i = warp_count() - 1 - warp_id(); i < tiles.batches * kTileRows; i += warp_count()) {
    alignas(16) float mine[kParts];
    load_lane_row(mine, values + static_cast<int64_t>(min(i, p.candidates - 1)) * dim);
    staged(i) = *reinterpret_cast<const Staged*>(mine);
    const float norm = lane_norm(mine);
    if (lane_id() == 0) work.norm[i] = norm;
  }
  __syncthreads();
  cluster_wait();
  const uint32_t to = remote_address(work.cosine + head * tiles.numbers() + lane_id(), 0), barrier = remote_address(&arrived, 0);
  for (; group < tiles.groups; group += warp_count()) {
    if (group >= tiles.slot_groups) {
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        load_staged(column[j], min((group - tiles.slot_groups) * kTileColumns + j, p.candidates - 1));
      }
    } else if (group != warp_id()) {
      load_slots(group);
    }
    float norm = 0.0f;
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
      const float here = lane_norm(column[j]);
      if (lane_id() % kTileColumns == j) norm = here;
    }
    for (int batch = 0; batch < tiles.batches; ++batch) {
      const float dot = tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_staged(to, batch * kTileRows + i); });
      const float cosine = div_rn(dot, mul_rn(work.norm[batch * kTileRows + lane_id() / kTileColumns], norm));
      send(to + (batch * tiles.groups + group) * kTile * sizeof(float), cosine, barrier);
    }
  }
  if (head != 0) return;
  if (threadIdx.x == 0) {
    hopper::arrive_expect(&arrived, static_cast<uint32_t>(p.kv_heads * tiles.numbers() * sizeof(float)));
  }
  wait_cluster(&arrived, 0);
  for (int item = threadIdx.x; item < tiles.numbers(); item += blockDim.x) {
    float total = 0.0f;
#pragma unroll 8
    for (int h = 0; h < p.kv_heads; ++h) total = add_rn(total, work.cosine[h * tiles.numbers() + item]);
    const int lane = item % kTile, tile = item / kTile;
    const int i = tile / tiles.groups * kTileRows + lane / kTileColumns;
    const int j = tile % tiles.groups * kTileColumns + lane % kTileColumns;
    work.score[i * tiles.groups * kTileColumns + j] = div_rn(total, static_cast<float>(p.kv_heads));
  }
  __syncthreads();
  if (decides) decide(p, work, tiles, bank, gate, position, b);
}

template <class T, int kParts>
cudaError_t run(const RouteExactBankParams& p, cudaStream_t stream) {
  const int threads = std::clamp(Tiles(p).groups, 1, kMaxWarps) * kWarp;
  return launch_clusters(route_exact_bank_kernel<T, kParts>, p.batch, p.kv_heads, threads, layout_bytes(p), stream, p);
}

}  // namespace

bool serves(const RouteExactBankParams& p, DType dtype) {
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (p.dim == 64 || p.dim == 128) && p.kv_heads >= 1 &&
         p.kv_heads <= kClusterBlocks && p.candidates >= 1 && p.candidates <= kWarp && p.slots >= 1 && p.slots <= kPerLane * kWarp &&
         layout_bytes(p) <= kClusterShared;
}

cudaError_t route_exact_bank(const RouteExactBankParams& p, DType dtype, cudaStream_t stream) {
  const auto by_dim = [&](auto zero) {
    using T = decltype(zero);
    return p.dim == 64 ? run<T, 2>(p, stream) : run<T, 4>(p, stream);
  };
  return dtype == DType::kBFloat16 ? by_dim(__nv_bfloat16{}) : by_dim(__half{});
}

}  // namespace coda::kernels::sm90
