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
  __host__ __device__ int tiles() const { return groups * batches; }
  // Floats from one candidate's scores to the next one's: odd, so that a column meets all banks.
  __host__ __device__ int pitch() const { return groups * kTileColumns + 1; }
};

struct Layout {
  float* row;       // (T, D) the candidates of this head
  float* norm;      // (T)
  float* cosine;    // (Hkv, tiles, kTilePitch) what all heads sent; this and the rest in block 0 alone
  uint32_t* key;    // (T, pitch) of the scores
  Match* match;     // (T) best slot
  int64_t* time;    // (Me + T) last touch of the slots, then position of the candidates
  uint32_t* order;  // (Me + T) of these
  bool* used;       // (Me)
  int* filled;      // (T)

  __host__ __device__ Layout(Carver& carver, const RouteExactBankParams& p, const Tiles& tiles)
      : row(carver.take<float>(int64_t{tiles.batches} * kTileRows * p.dim)), norm(carver.take<float>(tiles.batches * kTileRows)),
        cosine(carver.take<float>(int64_t{p.kv_heads} * tiles.tiles() * kTilePitch)),
        key(carver.take<uint32_t>(p.candidates * tiles.pitch())), match(carver.take<Match>(p.candidates)),
        time(carver.take<int64_t>(p.slots + p.candidates)), order(carver.take<uint32_t>(p.slots + p.candidates)),
        used(carver.take<bool>(p.slots)), filled(carver.take<int>(kWarp)) {}
};

size_t layout_bytes(const RouteExactBankParams& p) {
  Carver sizes(nullptr);
  Layout(sizes, p, Tiles(p));
  return sizes.used();
}

// The mean cosines of one candidate, its best slot among them. One warp.
__device__ void score_candidate(const RouteExactBankParams& p, const Layout& work, const Tiles& tiles, int c) {
  const float reciprocal = 1.0f / static_cast<float>(p.kv_heads);
  const float* sent = work.cosine + c / kTileRows * tiles.groups * kTilePitch + c % kTileRows * kTileColumns;
  uint32_t* key = work.key + c * tiles.pitch();
#pragma unroll 1
  for (int column = lane_id(); column < tiles.groups * kTileColumns; column += kWarp) {
    const float score = head_mean(sent + column / kTileColumns * kTilePitch + column % kTileColumns, tiles.tiles() * kTilePitch,
                                  p.kv_heads, reciprocal);
    key[column] = column < p.slots && !work.used[column] ? 0 : score_key(score);
  }
  const Match match = best_match(p.slots, [&](int j) { return key[j]; });
  if (lane_id() == 0) work.match[c] = match;
}

__device__ void decide(const RouteExactBankParams& p, const Layout& work, const Tiles& tiles, double gate, int64_t b) {
  const NoveltyRule rule{p.slots, p.num_sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
  const unsigned kept =
      p.slots == p.num_sinks ? 0 : __ballot_sync(kAllLanes, lane_id() < p.candidates && gate >= p.tau_exact);
  SlotQueue queue;
  queue.load(p.slots, p.num_sinks, [&](int j) { return work.used[j]; }, [&](int j) { return work.order[j]; });
  int slot;
  const auto key = [&](int c, int column) { return work.key[min(c, p.candidates - 1) * tiles.pitch() + column]; };
  const RouteAction action = queue.route(
      rule, kept, work.match[min(lane_id(), p.candidates - 1)], [&](int i) { return work.order[p.slots + i]; },
      [&](int c, int i) { return key(c, tiles.slot_groups * kTileColumns + i); }, key, work.filled, slot);
  if (lane_id() < p.candidates) {
    p.slot[b * p.candidates + lane_id()] = slot;
    p.action[b * p.candidates + lane_id()] = action;
  }
  // The last candidate that touched a slot.
  const unsigned together = __match_any_sync(kAllLanes, slot);
  if (slot >= 0 && kWarp - 1 - __clz(together) == lane_id()) work.time[slot] = work.time[p.slots + lane_id()];
  __syncwarp();
  for (int j = lane_id(); j < p.slots; j += kWarp) p.new_last_touch[b * p.slots + j] = work.time[j];
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
    if (head == 0) {
      hopper::arrive_expect(&arrived, static_cast<uint32_t>(p.kv_heads * tiles.tiles() * kTile * sizeof(float)));
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
  int group = warp_id();
  if (group < tiles.slot_groups) load_slots(group);  // underway with the candidates
  for (int i = warp_count() - 1 - warp_id(); i < tiles.batches * kTileRows; i += warp_count()) {
    alignas(16) float mine[kParts];
    load_lane_row(mine, values + static_cast<int64_t>(min(i, p.candidates - 1)) * dim);
    staged(i) = *reinterpret_cast<const Staged*>(mine);
    const float norm = lane_norm(mine);
    if (lane_id() == 0) work.norm[i] = norm;
  }
  double gate = 0.0;
  const int item = static_cast<int>(blockDim.x - 1 - threadIdx.x), items = p.slots + p.candidates;
  if (head == 0) {
    if (warp_id() == 0 && lane_id() < p.candidates) gate = p.gate[b * p.candidates + lane_id()];
    for (int j = item; j < items; j += blockDim.x) {
      if (j < p.slots) work.used[j] = p.used[b * p.slots + j];
      work.time[j] = j < p.slots ? p.last_touch[b * p.slots + j] : p.position[b * p.candidates + j - p.slots];
    }
  }
  __syncthreads();
  cluster_wait();  // other blocks must run before anything is sent to them
  if (head == 0) {
    // By the last warps, to which no tiles fall where there are few.
    for (int j = item; j < items; j += blockDim.x) work.order[j] = order_among(work.time, items, work.time[j]);
  }
  const uint32_t to = remote_address(work.cosine + head * tiles.tiles() * kTilePitch + lane_id(), 0),
                 barrier = remote_address(&arrived, 0);
  for (; group < tiles.groups; group += warp_count()) {
    if (group >= tiles.slot_groups) {
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        load_staged(column[j], min((group - tiles.slot_groups) * kTileColumns + j, p.candidates - 1));
      }
    } else if (group != warp_id()) {
      load_slots(group);
    }
    const float norm = column_norm(column);
    for (int batch = 0; batch < tiles.batches; ++batch) {
      const float dot =
          tile_dots<true>(column, [&](float(&to)[kParts], int i) { load_staged(to, batch * kTileRows + i); });
      const float cosine = div_rn(dot, mul_rn(work.norm[batch * kTileRows + lane_id() / kTileColumns], norm));
      send(to + (batch * tiles.groups + group) * kTilePitch * sizeof(float), cosine, barrier);
    }
  }
  if (head != 0) return;
  wait_cluster(&arrived, 0);
  for (int c = warp_id(); c < p.candidates; c += warp_count()) score_candidate(p, work, tiles, c);
  __syncthreads();
  if (warp_id() != 0) return;
  decide(p, work, tiles, gate, b);
}

template <class T, int kParts>
cudaError_t run(const RouteExactBankParams& p, cudaStream_t stream) {
  const int warps = Tiles(p).groups + (p.slots + p.candidates + kWarp - 1) / kWarp;
  return launch_clusters(route_exact_bank_kernel<T, kParts>, p.batch, p.kv_heads, std::min(warps, kMaxWarps) * kWarp,
                         layout_bytes(p), stream, p);
}

}  // namespace

bool serves(const RouteExactBankParams& p, DType dtype) {
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && (p.dim == 64 || p.dim == 128) && p.kv_heads >= 1 &&
         p.kv_heads <= kClusterBlocks && p.candidates >= 1 && p.candidates <= kWarp && p.slots >= 1 &&
         p.slots <= kPerLane * kWarp && layout_bytes(p) <= kClusterShared;
}

cudaError_t route_exact_bank(const RouteExactBankParams& p, DType dtype, cudaStream_t stream) {
  const auto by_dim = [&](auto zero) {
    using T = decltype(zero);
    return p.dim == 64 ? run<T, 2>(p, stream) : run<T, 4>(p, stream);
  };
  return dtype == DType::kBFloat16 ? by_dim(__nv_bfloat16{}) : by_dim(__half{});
}

}  // namespace coda::kernels::sm90
