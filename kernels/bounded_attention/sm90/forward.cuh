#pragma once

// One block: a warpgroup that brings keys and values, one that brings queries, and two that attend, 64 query rows each. With two streams
// these are the same rows, in q and in R_theta q; with one, neighbouring ones. README.md has the reasons.

#include "../../common/wgmma.cuh"
#include "../../diff_attention/sm90/tiles.cuh"
#include "bring_keys.cuh"
#include "bring_queries.cuh"

namespace coda::kernels::sm90::bounded {

enum NamedBarrier { kSecondFull = 1, kSecondEmpty };

// One consumer warpgroup: one online softmax for each item, over its bank and then its window. Tiles of all items run in one stream,
// so that the first logits of an item are computed while the item before it ends.
template <class T, int D, int Streams>
struct Attend {
  using Memory = Shared<T, D, Streams>;
  const Arguments& p;
  Memory& shared;
  const int warpgroup, stream;
  hopper::RingPosition<Memory::kStages> k_at, v_at;
  hopper::RingPosition<kQuerySets> q_at;

  // Of this thread's two rows, eight apart.
  struct Rows {
    uint32_t line[2];  // token * H + head; kNoLine past the end of the chunk
    float lam[2];
    float peak[2], total[2];  // of this thread's columns
  };
  static constexpr uint32_t kNoLine = 0xffffffffu;
  Rows rows;
  int visible[2];  // leading keys of the window that each row sees
  int bank_tiles, tiles, tile;
  float o[D / 2];

  __device__ Attend(const Arguments& arguments, Memory& memory, int group)
      : p(arguments), shared(memory), warpgroup(group), stream(Streams == 2 ? group : 0) {}

  // False after the last item.
  __device__ bool take_item() {
    hopper::wait(&shared.q_full[q_at.stage], q_at.parity);
    const Item& item = shared.item[q_at.stage];
    tile = 0;
    tiles = item.tiles;
    if (tiles == 0) return false;
    bank_tiles = item.bank_tiles;
    const unsigned group = p.group;
    const int row0 = item.row0 + (Streams == 2 ? 0 : warpgroup * kRows) + threadIdx.x % hopper::kWarpgroup / kWarp * 16 + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned r = row0 + 8 * i, token = r / group;
      const bool real = static_cast<int>(r) < item.rows;
      rows.line[i] = real ? item.line0 + token * p.heads + r % group : kNoLine;
      rows.lam[i] = stream == 1 && real ? static_cast<const float*>(p.lam)[rows.line[i]] : 0.0f;
      rows.peak[i] = neg_inf<float>();
      rows.total[i] = 0.0f;
      visible[i] = item.seen + static_cast<int>(token) + 1;
    }
    return true;
  }

  __device__ void start_logits(float (&s)[kKeys / 2]) {
    if (p.turned && tile == bank_tiles) hopper::wait(&shared.q_full[q_at.stage], q_at.parity);
    hopper::wait(&shared.k_full[k_at.stage], k_at.parity);
    const auto q = hopper::rows_descriptor(shared.q[q_at.stage][warpgroup]);
    const auto k = hopper::rows_descriptor(shared.k[k_at.stage]);
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
      const float* bias = shared.bias[k_at.stage] + column;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * i);
        s[4 * i] += b.x;
        s[4 * i + 1] += b.y;
        s[4 * i + 2] += b.x;
        s[4 * i + 3] += b.y;
      }
    }
    release(&shared.k_empty[k_at.stage]);
    k_at.advance();
    if (tile + 1 == tiles || (p.turned && tile + 1 == bank_tiles)) {
      release(&shared.q_empty[q_at.stage]);
      q_at.advance();
    }
    const int key0 = (tile - bank_tiles) * kKeys;
    if (tile >= bank_tiles && key0 + kKeys > visible[0]) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (key0 + column + i / 4 * 8 + i % 2 >= visible[i % 4 / 2]) s[i] = neg_inf<float>();
      }
    }
  }

  // Logits to weights relative to the new peaks; returns how much earlier weights shrink.
  __device__ float2 absorb(float (&s)[kKeys / 2]) {
    float shrink[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = rows.peak[row];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float base = top == neg_inf<float>() ? 0.0f : top * p.log2_scale;
      shrink[row] = exp2_approximate(rows.peak[row] * p.log2_scale - base);
      rows.peak[row] = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * row + e];
          x = exp2_approximate(fmaf(x, p.log2_scale, -base));
          sum += x;
        }
      }
      rows.total[row] = rows.total[row] * shrink[row] + sum;
    }
    return {shrink[0], shrink[1]};
  }

  __device__ void shrink_output(float2 by) {
    if (!__any_sync(kAllLanes, by.x != 1.0f || by.y != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= i % 4 < 2 ? by.x : by.y;
  }

  __device__ void start_output(const uint32_t (&weights)[kKeys / 16][4], bool add) {
    hopper::wait(&shared.v_full[v_at.stage], v_at.parity);
    const auto v = hopper::columns_descriptor(shared.v[v_at.stage], kKeys * 128);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < kKeys / 16; ++block) {
      hopper::multiply<T, 1>(o, weights[block], v + block * (2048 >> 4), add || block > 0);
    }
    hopper::commit_products();
  }

  __device__ void finish_output() {
    hopper::wait_products<0>();
    hopper::pin(o);
    release(&shared.v_empty[v_at.stage]);
    v_at.advance();
  }

  __device__ void run() {
    if (!take_item()) return;
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
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
      // The logits of one tile are computed while the weights of the one before it meet their values.
      start_logits(s);
      start_output(weights, begun);
      hopper::wait_products<1>();
      finish_logits(s);
      const float2 shrink = absorb(s);
      // The assembler would otherwise put the wait before the exponentials, which are to overlap with what it waits for.
      __syncwarp(rows.total[0] + rows.total[1] < 0.0f ? 0u : kAllLanes);
      finish_output();
      if (last) {
        finish(done);
      } else {
        shrink_output(shrink);
      }
      pack_operand<T>(weights, s);
      begun = !last;
    }
    start_output(weights, begun);
    finish_output();
    finish(done);
  }

  // Divides by the totals; writes lse.
  __device__ void normalize(Rows& done) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& sum = done.total[row];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        o[4 * i + 2 * row] *= inverse;
        o[4 * i + 2 * row + 1] *= inverse;
      }
      if (p.lse && done.line[row] != kNoLine && lane_id() % 4 == 0) {
        const float lse = sum > 0.0f ? done.peak[row] * p.logit_scale + logf(sum) : neg_inf<float>();
        static_cast<float*>(p.lse)[stream * p.tokens * p.heads + done.line[row]] = lse;
      }
    }
  }

  __device__ void store(const Rows& done, void* to) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      T* line = static_cast<T*>(to) + static_cast<int64_t>(done.line[row]) * D;
#pragma unroll
      for (int block = 0; block < D / 32; ++block) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = pack<T>(o[block * 16 + 4 * i + 2 * row], o[block * 16 + 4 * i + 2 * row + 1]);
        transpose_quad(x);
        if (done.line[row] != kNoLine) {
          *reinterpret_cast<uint4*>(line + block * 32 + lane_id() % 4 * 8) = uint4{x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

  __device__ void finish(Rows& done) {
    normalize(done);
    if (Streams == 2) {
      auto* exchange = reinterpret_cast<float4*>(shared.second) + threadIdx.x % hopper::kWarpgroup;
      if (stream == 1) {
        if (p.o2) store(done, p.o2);
        hopper::sync_threads(kSecondEmpty, 2 * hopper::kWarpgroup);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          exchange[i * hopper::kWarpgroup] = float4{o[4 * i] * done.lam[0], o[4 * i + 1] * done.lam[0],
                                                    o[4 * i + 2] * done.lam[1], o[4 * i + 3] * done.lam[1]};
        }
        hopper::arrive_threads(kSecondFull, 2 * hopper::kWarpgroup);
        return;
      }
      hopper::sync_threads(kSecondFull, 2 * hopper::kWarpgroup);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float4 x = exchange[i * hopper::kWarpgroup];
        o[4 * i] -= x.x;
        o[4 * i + 1] -= x.y;
        o[4 * i + 2] -= x.z;
        o[4 * i + 3] -= x.w;
      }
      hopper::arrive_threads(kSecondEmpty, 2 * hopper::kWarpgroup);
    }
    if (p.norm_weight) {
      if (p.diff) store(done, p.diff);
      const float* weight = shared.norm_weight + lane_id() % 4 * 2;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          const float a = o[4 * i + 2 * row], b = o[4 * i + 2 * row + 1];
          square += a * a + b * b;
        }
        square += __shfl_xor_sync(kAllLanes, square, 1);
        square += __shfl_xor_sync(kAllLanes, square, 2);
        const float rstd = rsqrtf(square / D + p.eps);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          const float2 w = *reinterpret_cast<const float2*>(weight + 8 * i);
          o[4 * i + 2 * row] *= rstd * w.x;
          o[4 * i + 2 * row + 1] *= rstd * w.y;
        }
      }
    }
    store(done, p.y);
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
    hopper::lower_registers<40>();
    BringKeys<T, D, Streams>(p, shared, warp_id()).run();
  } else if (warpgroup == 1) {
    hopper::lower_registers<72>();
    BringQueries<T, D, Streams>(p, shared).run();
  } else {
    hopper::raise_registers<200>();
    Attend<T, D, Streams> attend(p, shared, warpgroup - 2);
    // The exchange is empty.
    if (Streams == 2 && warpgroup == 2) hopper::arrive_threads(kSecondEmpty, 2 * hopper::kWarpgroup);
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
