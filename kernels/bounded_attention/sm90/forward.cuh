#pragma once

// One block: a warpgroup that brings keys and values, one that brings queries, and two that attend, 64 query rows each. With two streams
// these are the same rows, in q and in R_theta q; with one, neighbouring ones. README.md has the reasons.

#include "../../common/wgmma.cuh"
#include "../../diff_attention/sm90/tiles.cuh"
#include "bring_keys.cuh"
#include "bring_queries.cuh"

namespace coda::kernels::sm90::bounded {

// One consumer warpgroup: one online softmax for each item, over its bank and then its window. Tiles of all items run in one stream,
// so that the first logits of an item are computed while the item before it ends.
template <class T, int D, int Streams>
struct Attend {
  using Memory = Shared<T, D, Streams>;
  const Arguments& p;
  Memory& shared;
  const int warpgroup, stream;
  unsigned keys_taken = 0, queries_taken = 0;  // tiles of logits begun before this one; sets of queries

  // Of this thread's two rows, eight apart.
  struct Rows {
    uint32_t line[2];  // token * H + head; kNoLine past the end of the chunk
    float peak[2], total[2];  // of this thread's columns
  };
  static constexpr uint32_t kNoLine = 0xffffffffu;
  Rows rows;
  int visible[2];  // leading keys of the window that each row sees
  int bank_tiles, tiles, tile;
  float o[D / 2];

  __device__ Attend(const Arguments& arguments, Memory& memory, int group)
      : p(arguments), shared(memory), warpgroup(group), stream(Streams == 2 ? group : 0) {}

  __device__ static int stage_of(unsigned n) { return n % Memory::kStages; }
  __device__ static uint32_t parity_of(unsigned n) { return n / Memory::kStages % 2; }
  __device__ int query_set() const { return queries_taken % kQuerySets; }
  __device__ void wait_queries() { hopper::wait(&shared.q_full[query_set()], queries_taken / kQuerySets % 2); }

  // False after the last item.
  __device__ bool take_item() {
    wait_queries();
    const Item& item = shared.item[query_set()];
    tile = 0;
    tiles = item.tiles;
    if (tiles == 0) return false;
    bank_tiles = item.bank_tiles;
    const int row0 = item.row0 + (Streams == 2 ? 0 : warpgroup * kRows) + threadIdx.x % hopper::kWarpgroup / kWarp * 16 + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row0 + 8 * i;
      const auto at = p.split(r);
      const bool real = r < item.rows;
      rows.line[i] = real ? item.line0 + at.token * p.heads + at.head : kNoLine;
      if (stream == 1 && real) asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const float*>(p.lam) + rows.line[i]));
      rows.peak[i] = neg_inf<float>();
      rows.total[i] = 0.0f;
      visible[i] = item.seen + at.token + 1;
    }
    return true;
  }

  __device__ void wait_keys() {
    if (p.turned && tile == bank_tiles) wait_queries();
    hopper::wait(&shared.k_full[stage_of(keys_taken)], parity_of(keys_taken));
  }

  __device__ void start_logits(float (&s)[kKeys / 2]) {
    const int stage = stage_of(keys_taken);
    const auto q = hopper::rows_descriptor(shared.q[query_set()][warpgroup]);
    const auto k = hopper::rows_descriptor(shared.k[stage]);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      hopper::multiply<T, 0, 0>(s, q + (block / 4 * kRows * 8 + block % 4 * 2), k + (block / 4 * kKeys * 8 + block % 4 * 2),
                                block > 0);
    }
    hopper::commit_products();
  }

  __device__ void release(uint64_t* empty) {
    __syncwarp();
    if (lane_id() == 0) hopper::arrive(empty);
  }

  // After the wait for them: adds the slots' bias, or takes away keys that a row does not see.
  __device__ void finish_logits(float (&s)[kKeys / 2]) {
    hopper::pin(s);
    const int column = lane_id() % 4 * 2;
    if (tile < bank_tiles) {
      const float* bias = shared.bias[stage_of(keys_taken)] + column;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * i);
        s[4 * i] += b.x;
        s[4 * i + 1] += b.y;
        s[4 * i + 2] += b.x;
        s[4 * i + 3] += b.y;
      }
    }
    release(&shared.k_empty[stage_of(keys_taken)]);
    ++keys_taken;
    if (tile + 1 == tiles || (p.turned && tile + 1 == bank_tiles)) {
      release(&shared.q_empty[query_set()]);
      ++queries_taken;
    }
    if (tile < bank_tiles) return;
    const int key0 = (tile - bank_tiles) * kKeys;
#pragma unroll
    for (int part = 0; part < kKeys; part += 32) {
      if (key0 + part + 32 <= visible[0]) continue;
#pragma unroll
      for (int i = part / 2; i < part / 2 + 16; ++i) {
        if (key0 + column + i / 4 * 8 + i % 2 >= visible[i % 4 / 2]) s[i] = neg_inf<float>();
      }
    }
  }

  // Logits to weights relative to the peaks; returns how much earlier weights shrink. A peak that grows by less than a factor of 2^8 in
  // the weights stays as it is: weights are floating-point numbers, and rescaling the output would cost more.
  __device__ float2 absorb(float (&s)[kKeys / 2]) {
    float top[2][2];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float x = fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]);
        top[row][i % 2] = i < 2 ? x : fmaxf(top[row][i % 2], x);
      }
    }
    float shrink[2], base[2], sum[2][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float x = fmaxf(top[row][0], top[row][1]);
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
      float& peak = rows.peak[row];
      const bool grows = (x - peak) * p.log2_scale > 8.0f;
      shrink[row] = grows ? exp2_approximate((peak - x) * p.log2_scale) : 1.0f;
      if (grows) peak = x;
      base[row] = peak == neg_inf<float>() ? 0.0f : peak * p.log2_scale;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * row + e];
          x = exp2_approximate(fmaf(x, p.log2_scale, -base[row]));
          sum[row][e] = i == 0 ? x : sum[row][e] + x;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) rows.total[row] = rows.total[row] * shrink[row] + (sum[row][0] + sum[row][1]);
    return {shrink[0], shrink[1]};
  }

  __device__ void shrink_output(float2 by) {
    if (!__any_sync(kAllLanes, by.x != 1.0f || by.y != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= i % 4 < 2 ? by.x : by.y;
  }

  // Of tile `n` of this block.
  __device__ void start_output(unsigned n, const uint32_t (&weights)[kKeys / 16][4], bool add) {
    hopper::wait(&shared.v_full[stage_of(n)], parity_of(n));
    const auto v = hopper::columns_descriptor(shared.v[stage_of(n)], kKeys * 128);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < kKeys / 16; ++block) {
      hopper::multiply<T, 1>(o, weights[block], v + block * (2048 >> 4), add || block > 0);
    }
    hopper::commit_products();
  }

  __device__ void finish_output(unsigned n) {
    hopper::wait_products<0>();
    hopper::pin(o);
    release(&shared.v_empty[stage_of(n)]);
  }

  __device__ void run() {
    if (!take_item()) return;
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    wait_keys();
    start_logits(s);
    hopper::wait_products<0>();
    finish_logits(s);
    absorb(s);
    pack_operand<T>(weights, s);
    bool begun = false;  // o holds earlier tiles of the item
    Rows done;
    while (true) {
      const bool last = tile + 1 == tiles;
      if (last) {
        done = rows;
        if (!take_item()) break;
      } else {
        ++tile;
      }
      // The logits of one tile are computed while the weights of the one before it meet their values. The warpgroups take turns, the
      // second first: items are too short for them to fall out of step by themselves, and the first waits for the second's output.
      wait_keys();
      hopper::sync_threads(kTurn + warpgroup, 2 * hopper::kWarpgroup);
      start_logits(s);
      start_output(keys_taken - 1, weights, begun);
      hopper::arrive_threads(kTurn + 1 - warpgroup, 2 * hopper::kWarpgroup);
      hopper::wait_products<1>();
      finish_logits(s);
      const float2 shrink = absorb(s);
      // The assembler would otherwise put the wait before the exponentials, which are to overlap with what it waits for.
      __syncwarp(rows.total[0] + rows.total[1] < 0.0f ? 0u : kAllLanes);
      finish_output(keys_taken - 2);
      if (last) {
        finish(done);
      } else {
        shrink_output(shrink);
      }
      pack_operand<T>(weights, s);
      begun = !last;
    }
    start_output(keys_taken - 1, weights, begun);
    finish_output(keys_taken - 1);
    finish(done);
  }

  // Outputs of the warp's 16 rows, element i of this thread's being value(i), through `stage`: what leaves registers in pairs of columns
  // goes out in whole rows.
  template <class Value>
  __device__ void store(const Rows& done, void* to, unsigned char* stage, Value value) const {
    constexpr int kPackets = D / kPacket, kRowsAtOnce = kWarp / kPackets;
    const int lane = lane_id();
    const auto packet_of = [&](int row, int packet) { return stage + row * (D * 2) + ((packet ^ (row & 7)) << 4); };
    __syncwarp();
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = pack<T>(value(8 * block + 2 * i), value(8 * block + 2 * i + 1));
      store_matrices(packet_of(lane % 16, 2 * block + lane / 16), x[0], x[1], x[2], x[3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane / kPackets, packet = lane % kPackets;
      const uint32_t line = __shfl_sync(kAllLanes, done.line[i * kRowsAtOnce / 8], row % 8 * 4);
      if (line == kNoLine) continue;
      reinterpret_cast<uint4*>(static_cast<T*>(to) + static_cast<int64_t>(line) * D)[packet] =
          *reinterpret_cast<const uint4*>(packet_of(row, packet));
    }
    __syncwarp();
  }

  __device__ void finish(Rows& done) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& sum = done.total[row];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      inverse[row] = sum > 0.0f ? 1.0f / sum : 0.0f;
      if (p.lse && done.line[row] != kNoLine && lane_id() % 4 == 0) {
        const float lse = sum > 0.0f ? done.peak[row] * p.logit_scale + logf(sum) : neg_inf<float>();
        static_cast<float*>(p.lse)[stream * p.tokens * p.heads + done.line[row]] = lse;
      }
    }
    // With two streams, lam o2 goes from a warp of the second to the same warp of the first as its registers lie; the first uses the
    // place as its stage, then gives it back.
    const int warp = threadIdx.x % hopper::kWarpgroup / kWarp;
    unsigned char* stage = shared.exchange + (Streams == 2 ? warp * 16 * D * 4 : (warpgroup * 4 + warp) * 16 * D * 2);
    auto* second = reinterpret_cast<float4*>(stage) + lane_id();
    if (stream == 1) {
      hopper::sync_threads(kSecondEmpty, 2 * hopper::kWarpgroup);
      if (p.o2) store(done, p.o2, stage, [&](int i) { return o[i] * inverse[i % 4 / 2]; });
      float factor[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        factor[row] = done.line[row] == kNoLine ? 0.0f : inverse[row] * static_cast<const float*>(p.lam)[done.line[row]];
      }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        second[i * kWarp] = float4{o[4 * i] * factor[0], o[4 * i + 1] * factor[0], o[4 * i + 2] * factor[1], o[4 * i + 3] * factor[1]};
      }
      hopper::arrive_threads(kSecondFull, 2 * hopper::kWarpgroup);
      return;
    }
    if (Streams == 2) {
      hopper::sync_threads(kSecondFull, 2 * hopper::kWarpgroup);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float4 x = second[i * kWarp];
        o[4 * i] = fmaf(o[4 * i], inverse[0], -x.x);
        o[4 * i + 1] = fmaf(o[4 * i + 1], inverse[0], -x.y);
        o[4 * i + 2] = fmaf(o[4 * i + 2], inverse[1], -x.z);
        o[4 * i + 3] = fmaf(o[4 * i + 3], inverse[1], -x.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= inverse[i % 4 / 2];
    }
    if (p.norm_weight) {
      if (p.diff) store(done, p.diff, stage, [&](int i) { return o[i]; });
      float rstd[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float square[2] = {};
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) square[e] = fmaf(o[4 * i + 2 * row + e], o[4 * i + 2 * row + e], square[e]);
        }
        float sum = square[0] + square[1];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        rstd[row] = rsqrtf(sum / D + p.eps);
      }
      const float* weight = shared.norm_weight + lane_id() % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float2 w = *reinterpret_cast<const float2*>(weight + 8 * i);
        o[4 * i] *= rstd[0] * w.x;
        o[4 * i + 1] *= rstd[0] * w.y;
        o[4 * i + 2] *= rstd[1] * w.x;
        o[4 * i + 3] *= rstd[1] * w.y;
      }
    }
    store(done, p.y, stage, [&](int i) { return o[i]; });
    if (Streams == 2) hopper::arrive_threads(kSecondEmpty, 2 * hopper::kWarpgroup);
  }
};

constexpr int kThreads = hopper::kWarpgroup * (2 + kConsumers);

template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, D, Streams>*>(memory);
  const int warpgroup = threadIdx.x / hopper::kWarpgroup;
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * hopper::kWarpgroup / kWarp;
    for (int set = 0; set < kQuerySets; ++set) {
      hopper::init_barrier(&shared.q_full[set], hopper::kWarpgroup / kWarp);
      hopper::init_barrier(&shared.q_empty[set], kWarps);
    }
    for (int stage = 0; stage < stages(D); ++stage) {
      hopper::init_barrier(&shared.k_full[stage], kBringers);
      hopper::init_barrier(&shared.v_full[stage], kBringers);
      hopper::init_barrier(&shared.k_empty[stage], kWarps);
      hopper::init_barrier(&shared.v_empty[stage], kWarps);
    }
    hopper::fence_barrier_init();
  }
  if (p.norm_weight && threadIdx.x < D) shared.norm_weight[threadIdx.x] = static_cast<const float*>(p.norm_weight)[threadIdx.x];
  __syncthreads();
  // 512 registers of four threads, one of each warpgroup.
  if (warpgroup == 0) {
    hopper::lower_registers<48>();
    BringKeys<T, D, Streams>(p, shared, warp_id()).run();
  } else if (warpgroup == 1) {
    hopper::lower_registers<64>();
    BringQueries<T, D, Streams>(p, shared).run();
  } else {
    hopper::raise_registers<200>();
    Attend<T, D, Streams> attend(p, shared, warpgroup - 2);
    // The exchange is empty.
    if (Streams == 2 && warpgroup == 2) hopper::arrive_threads(kSecondEmpty, 2 * hopper::kWarpgroup);
    if (warpgroup == 2) hopper::arrive_threads(kTurn + 1, 2 * hopper::kWarpgroup);
    attend.run();
  }
}

template <class T, int D, int Streams>
cudaError_t launch_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  Arguments p{};
  static_cast<BoundedAttentionForward&>(p) = params;
  p.row_tiles = static_cast<unsigned>(tiles_per_chunk(p, item_rows(Streams)));
  p.items = static_cast<unsigned>(p.chunk_rows * p.kv_heads * p.row_tiles);
  p.group = p.heads / p.kv_heads;
  p.group_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / p.group + 1);
  p.summary_rows = p.chunk_rows * p.kv_heads * p.summary_slots;
  p.turned = p.has_bank_distance && p.exact_slots + p.summary_slots > 0;
  p.logit_scale = static_cast<float>(p.scale);
  p.log2_scale = static_cast<float>(p.scale * 1.4426950408889634);
  p.inverse_scale = static_cast<float>(1.0 / p.scale);
  p.eps = static_cast<float>(p.norm_eps);
  const auto map = [&](CUtensorMap& to, const void* base) {
    const Strides strides{0, static_cast<int64_t>(p.kv_heads) * D, D};
    return make_tensor_map(to, base, dtype, head_tile(D, p.kv_heads, p.tokens, 1, strides, kKeys));
  };
  auto status = map(p.k_map, p.k);
  if (status == cudaSuccess) status = map(p.v_map, p.v);
  int multiprocessors = 0;
  if (status == cudaSuccess) status = multiprocessor_count(multiprocessors);
  if (status != cudaSuccess) return status;
  const dim3 grid(std::min<unsigned>(p.items, multiprocessors));
  return launch(forward_kernel<T, D, Streams>, grid, kThreads, sizeof(Shared<T, D, Streams>), stream, p);
}

template <int D>
cudaError_t launch_forward_d(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) {
    return params.streams == 2 ? launch_forward<__nv_bfloat16, D, 2>(params, dtype, stream)
                               : launch_forward<__nv_bfloat16, D, 1>(params, dtype, stream);
  }
  return params.streams == 2 ? launch_forward<__half, D, 2>(params, dtype, stream)
                             : launch_forward<__half, D, 1>(params, dtype, stream);
}

}  // namespace coda::kernels::sm90::bounded
