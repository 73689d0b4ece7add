#pragma once

// One block: a warpgroup that brings queries, keys and values, and two that attend. With two streams a warpgroup has its 32 query rows
// twice, in q and in R_theta q; with one, 64. README.md has the reasons.

#include "../../common/wgmma.cuh"
#include "../../diff_attention/sm90/tiles.cuh"
#include "bring.cuh"

namespace coda::kernels::sm90::bounded {

// One consumer warpgroup: one online softmax for each item. Tiles of all items run in one stream, so that the first logits of an item are
// computed while the item before it ends. A thread has two rows of every product, eight apart: with two streams they are one query in
// both, so that o1 - lam o2 and its norm need nobody else.
template <class T, int D, int Streams>
struct Attend {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kOwn = 2 / Streams;  // query rows of a thread
  const Arguments& p;
  Memory& shared;
  const int warpgroup;
  const int row0;  // this thread's first, within an item
  unsigned items = 0, sets = 0;  // taken, the latter of queries

  struct Rows {
    uint32_t line[kOwn];  // token * H + head; kNoLine past the end of the chunk
    float total[2];  // of this thread's columns; after the item's last tile, the inverse of all columns'
    float ratio;     // then: see finish
  };
  static constexpr uint32_t kNoLine = 0xffffffffu;
  Rows rows;
  float peak[2];
  int visible[kOwn];  // leading keys of the window that each row sees
  int tiles, window_tiles, step;
  int tile, next_tile;  // the step's, and how far from there the next one's is: forwards or backwards
  bool follows, followed;
  float o[D / 2];

  __device__ Attend(const Arguments& arguments, Memory& memory, int group)
      : p(arguments), shared(memory), warpgroup(group),
        row0((group * hopper::kWarpgroup + threadIdx.x % hopper::kWarpgroup) / kWarp * 8 * kOwn + lane_id() / 4) {}

  // Where the keys and values of a tile are, in one register.
  struct Position {
    int packed;
    __device__ int stage() const { return packed >> 2; }
    __device__ uint32_t parity() const { return packed & 1; }
    __device__ bool keep() const { return packed & 2; }  // for the next item
  };
  Ring<Memory::kStages> ring;
  __device__ Position next_position() {
    ring.advance(ring.fresh(follows, step));
    return {ring.stage << 2 | ring.keeps(followed, step, tiles) << 1 | static_cast<int>(ring.parity())};
  }

  __device__ static void release(uint64_t* empty, bool really = true) {
    __syncwarp();
    hopper::arrive_if(empty, really && lane_id() == 0);
  }

  __device__ void take_queries() {
    hopper::wait(&shared.q_full[sets % kQuerySets], sets / kQuerySets % 2);
    ++sets;
  }

  // False after the last item.
  __device__ bool take_item() {
    take_queries();
    const Item& item = shared.item[items++ % kItems];
    step = 0;
    tiles = item.tiles;
    if (tiles == 0) return false;
    window_tiles = item.window_tiles;
    tile = item.backwards ? tiles - 1 : 0;
    next_tile = item.backwards ? -1 : 1;
    follows = item.follows;
    ring.begin(follows);
    followed = item.followed;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      peak[i] = neg_inf<float>();
      rows.total[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int r = item.row0 + row0 + 8 * i;
      const auto at = p.split(r);
      const bool real = r < item.rows;
      rows.line[i] = real ? item.line0 + at.token * p.heads + at.head : kNoLine;
      visible[i] = item.seen + at.token + 1;
      if (Streams == 2) {
      }
    }
    return true;
  }

  // Those of the bank begin with the slots' bias.
  __device__ void start_logits(float (&s)[kKeys / 2], Position at) {
    hopper::wait(&shared.k_full[at.stage()], at.parity());
    const bool bank = tile >= window_tiles;
    if (bank) {
      const float* bias = shared.bias[at.stage()] + lane_id() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * i);
        s[4 * i] = s[4 * i + 2] = b.x;
        s[4 * i + 1] = s[4 * i + 3] = b.y;
      }
      hopper::pin(s);
    }
    const auto q = hopper::rows_descriptor(shared.q[(sets - 1) % kQuerySets][warpgroup]);
    const auto k = hopper::rows_descriptor(shared.k[at.stage()]);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      hopper::multiply<T, 0, 0>(s, q + (block / 4 * 64 * 8 + block % 4 * 2), k + (block / 4 * kKeys * 8 + block % 4 * 2),
                                bank || block > 0);
    }
    hopper::commit_products();
  }

  // After the wait for them: takes away keys that a row does not see.
  __device__ void finish_logits(float (&s)[kKeys / 2], Position at) {
    hopper::pin(s);
    if (tile < window_tiles) {
      const int column = lane_id() % 4 * 2;
      int seen[kOwn];  // from this thread's first column on
#pragma unroll
      for (int i = 0; i < kOwn; ++i) seen[i] = visible[i] - tile * kKeys - column;
#pragma unroll
      for (int part = 0; part < kKeys; part += 64) {
        if (__all_sync(kAllLanes, part + 57 < seen[0])) continue;
#pragma unroll
        for (int i = part / 2; i < part / 2 + 32; ++i) {
          if (i / 4 * 8 + i % 2 >= seen[i % 4 / 2 * (kOwn - 1)]) s[i] = neg_inf<float>();
        }
      }
    }
    release(&shared.k_empty[at.stage()], !at.keep());
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
      const bool grows = (x - peak[row]) * p.log2_scale > 8.0f;
      shrink[row] = grows ? exp2_approximate((peak[row] - x) * p.log2_scale) : 1.0f;
      if (grows) peak[row] = x;
      base[row] = peak[row] == neg_inf<float>() ? 0.0f : peak[row] * p.log2_scale;
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

  __device__ void start_output(Position at, const uint32_t (&weights)[kKeys / 16][4], bool add) {
    hopper::wait(&shared.v_full[at.stage()], at.parity());
    const auto v = hopper::columns_descriptor(shared.v[at.stage()], kKeys * 128);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < kKeys / 16; ++block) {
      hopper::multiply<T, 1>(o, weights[block], v + block * (2048 >> 4), add || block > 0);
    }
    hopper::commit_products();
  }

  __device__ void run() {
    if (!take_item()) return;
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    Rows ended;  // whose output is in o
#pragma unroll
    for (int i = 0; i < kOwn; ++i) ended.line[i] = kNoLine;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
    hopper::pin(o);
    Position before{2}, now = next_position();
    start_logits(s, now);
    hopper::commit_products();  // in place of an output's
    while (true) {
      const bool last = step + 1 == tiles, others = p.turns_queries && tile + 1 == window_tiles;
      hopper::wait_products<1>();
      finish_logits(s, now);
      release(&shared.q_empty[(sets - 1) % kQuerySets], last || others);
      const float2 shrink = absorb(s);
      // The assembler would otherwise put the wait before the exponentials, which are to overlap with what it waits for.
      __syncwarp(rows.total[0] + rows.total[1] < 0.0f ? 0u : kAllLanes);
      hopper::wait_products<0>();
      hopper::pin(o);
      release(&shared.v_empty[before.stage()], !before.keep());
      pack_operand<T>(weights, s);
      const bool begun = step > 0;
      if (begun) {
        shrink_output(shrink);
      } else {
        finish(ended);
      }
      before = now;
      if (last) {
        invert_totals();
        ended = rows;
        if (!take_item()) {
          start_output(before, weights, begun);
          break;
        }
      } else {
        ++step;
        tile += next_tile;
        if (others) take_queries();
      }
      now = next_position();
      // The logits of one tile are computed while the weights of the one before it meet their values.
      start_logits(s, now);
      start_output(before, weights, begun);
    }
    hopper::wait_products<0>();
    hopper::pin(o);
    finish(ended);
  }

  // Element i of a row's D / 4 of this thread being value(i). Four lanes exchange words so that each stores 16 bytes.
  template <class Value>
  __device__ void store(void* to, uint32_t line, Value value) const {
#pragma unroll
    for (int block = 0; block < D / 32; ++block) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = pack<T>(value(8 * block + 2 * j), value(8 * block + 2 * j + 1));
      transpose_quad(x);
      if (line != kNoLine) {
        reinterpret_cast<uint4*>(static_cast<T*>(to) + static_cast<int64_t>(line) * D)[block * 4 + lane_id() % 4] =
            uint4{x[0], x[1], x[2], x[3]};
      }
    }
  }

  // After the item's last tile.
  __device__ void invert_totals() {
    float sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = rows.total[i];
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      rows.total[i] = sum[i] > 0.0f ? __fdividef(1.0f, sum[i]) : 0.0f;
      const uint32_t line = rows.line[i * (kOwn - 1)];
      if (p.lse && line != kNoLine && lane_id() % 4 == 0) {
        const float lse = sum[i] > 0.0f ? peak[i] * p.logit_scale + logf(sum[i]) : neg_inf<float>();
        static_cast<float*>(p.lse)[(Streams == 2 ? i * p.tokens * p.heads : 0) + line] = lse;
      }
    }
    if (Streams == 2) rows.ratio = shared.lam[(items - 1) % kItems][row0] * rows.total[1] * sum[0];
  }

  // y = scale (o1 - ratio o2) of what the products gave, where scale is the inverse total of the first stream and, under the norm, 1 / rms.
  __device__ void finish(const Rows& done) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t line = done.line[i];
      const auto of = [&](int row, int e) { return o[e / 2 * 4 + 2 * row + e % 2]; };
      float scale = done.total[i];
      float y[D / 4];
#pragma unroll
      for (int e = 0; e < D / 4; ++e) y[e] = Streams == 2 ? fmaf(of(1, e), -done.ratio, of(0, e)) : of(i, e);
      if (Streams == 2 && p.o2) store(p.o2, line, [&](int e) { return of(1, e) * done.total[1]; });
      if (p.norm_weight) {
        if (p.diff) store(p.diff, line, [&](int e) { return y[e] * scale; });
        float square[2] = {};
#pragma unroll
        for (int e = 0; e < D / 4; ++e) square[e % 2] = fmaf(y[e], y[e], square[e % 2]);
        float sum = square[0] + square[1];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        scale *= rsqrtf(sum * scale * scale / D + p.eps);
        const float* weight = shared.norm_weight + lane_id() % 4 * 2;
#pragma unroll
        for (int w = 0; w < D / 8; ++w) {
          const float2 by = *reinterpret_cast<const float2*>(weight + 8 * w);
          y[2 * w] *= by.x;
          y[2 * w + 1] *= by.y;
        }
      }
      store(p.y, line, [&](int e) { return y[e] * scale; });
    }
  }
};

constexpr int kThreads = hopper::kWarpgroup * (2 + kConsumers);

template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Arguments p) {
  static_assert(sizeof(Shared<T, D, Streams>) <= 227 * 1024);
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, D, Streams>*>(memory);
  const int warpgroup = threadIdx.x / hopper::kWarpgroup;
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * hopper::kWarpgroup / kWarp;
    for (int set = 0; set < kQuerySets; ++set) {
      hopper::init_barrier(&shared.q_full[set], kBringers);
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
  // 512 registers of four threads, one of each warp of a scheduler.
  if (warpgroup == 0) {
    hopper::lower_registers<48>();
    BringKeys<T, D, Streams>(p, shared, warp_id()).run();
  } else if (warpgroup == 1) {
    hopper::lower_registers<48>();
    BringQueries<T, D, Streams>(p, shared, warp_id()).run();
  } else {
    hopper::raise_registers<208>();
    Attend<T, D, Streams>(p, shared, warpgroup - 2).run();
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
  const bool turns = p.has_bank_distance && p.exact_slots + p.summary_slots > 0;
  p.turns_keys = turns && (Streams == 1 || p.theta_interleaved == p.rope_interleaved);
  p.turns_queries = turns && !p.turns_keys;
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
