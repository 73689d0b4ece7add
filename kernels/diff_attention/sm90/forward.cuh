#pragma once

// One block: a producer warp that brings tiles, and two consumer warpgroups of 64 query rows each. With two streams these are the
// same tokens, in q and in R_theta q; with one, neighbouring ones. README.md has the reasons.

#include "bring_tiles.cuh"

namespace coda::kernels::sm90 {

// Named barriers; kCleared is the first of two, one for each warpgroup.
enum NamedBarrier { kTurned = 1, kCleared };

// One consumer warpgroup: online softmax over the key tiles of an item, last one first, item after item.
template <class T, int D, int Streams>
struct Attend {
  using Shared = ForwardShared<T, D, Streams>;
  static constexpr int kKeys = Shared::kKeys;
  static constexpr bool kAhead = D == 64 && Streams == 2;
  using Position = hopper::RingPosition<Shared::kStages>;
  // This thread's rows of an item: the first, and one 8 further.
  struct Rows {
    int token, queries, keys, head;
    int64_t output0;
    float peak[2], total[2];  // of this thread's columns
  };

  const ForwardArguments& p;
  Shared& shared;
  const int warpgroup, stream;
  float log2_scale;
  uint32_t q_parity = 0, second_parity = 0;
  Position at;  // of the values at work
  Rows rows;
  int tile = 0;  // of keys, whose weights are next to meet their values
  int seen;  // keys that the warpgroup sees of an item's first tile
  int visible[2];
  uint32_t q[D / 16][4];
  float o[D / 2];

  __device__ Attend(const ForwardArguments& arguments, Shared& s, int group)
      : p(arguments), shared(s), warpgroup(group), stream(Streams == 2 ? group : 0),
        log2_scale(static_cast<float>(arguments.scale * 1.4426950408889634)) {}

  __device__ int row0() const { return Streams == 2 ? 0 : warpgroup * kRows; }

  // The next item that sees a key, and its queries.
  __device__ bool take_item() {
    while (true) {
      hopper::wait(&shared.q_full, q_parity);
      q_parity ^= 1;
      const Work work = shared.work;
      const int key_tiles = uniform(work.key_tiles);
      if (key_tiles == kNoWork) return false;
      rows.token = work.begin + row0() + threadIdx.x % hopper::kWarpgroup / kWarp * 16 + lane_id() / 4;
      rows.queries = work.queries;
      rows.keys = work.keys;
      rows.head = work.head;
      rows.output0 = work.output0;
      tile = key_tiles - 1;
      seen = uniform(work.visible(work.begin + row0() + kRows - 1)) - tile * kKeys;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        visible[i] = work.visible(rows.token + 8 * i);
        rows.peak[i] = neg_inf<float>();
        rows.total[i] = 0.0f;
      }
      if (key_tiles > 0) {
        load_queries();
        return true;
      }
      hopper::arrive(&shared.q_empty);
      store_nothing();
    }
  }

  __device__ void load_queries() {
    const int warp = threadIdx.x % hopper::kWarpgroup / kWarp, lane = lane_id();
    const int row = row0() + warp * 16 + lane % 16;
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      const auto* panel = reinterpret_cast<const unsigned char*>(shared.q + block / 4 * Shared::kTokens * 64);
      load_matrices(q[block], panel + hopper::swizzled(row, block % 4 * 2 + lane / 16));
    }
    await_loads(q);
    hopper::arrive(&shared.q_empty);
    if (stream == 1) turn_queries();
  }

  // q to R_theta q.
  __device__ void turn_queries() {
    const int thread = threadIdx.x % hopper::kWarpgroup;
    auto& theta = shared.theta;
    hopper::sync_threads(kTurned, hopper::kWarpgroup);
    if (thread < D / 2) theta[thread] = angle_of(static_cast<const float*>(p.theta)[rows.head * (D / 2) + thread]);
    hopper::sync_threads(kTurned, hopper::kWarpgroup);
    const int column = lane_id() % 4 * 2;
    if (p.theta_interleaved) {
#pragma unroll
      for (int block = 0; block < D / 16; ++block) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float2 x = unpack<T>(q[block][r]);
          turn_pair(x.x, x.y, theta[(block * 16 + r / 2 * 8 + column) / 2]);
          q[block][r] = pack<T>(x.x, x.y);
        }
      }
    } else {
#pragma unroll
      for (int block = 0; block < D / 32; ++block) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int first = block * 16 + r / 2 * 8 + column;
          float2 a = unpack<T>(q[block][r]), b = unpack<T>(q[block + D / 32][r]);
          turn_pair(a.x, b.x, theta[first]);
          turn_pair(a.y, b.y, theta[first + 1]);
          q[block][r] = pack<T>(a.x, a.y);
          q[block + D / 32][r] = pack<T>(b.x, b.y);
        }
      }
    }
  }

  __device__ void wait_keys(const Position& keys) {
    hopper::wait(&shared.k_full[keys.stage], keys.parity);
  }
  __device__ void wait_values() { hopper::wait(&shared.v_full[at.stage], at.parity); }

  template <int Count>
  __device__ void start_logits(float (&s)[Count], int stage) {
    const auto k = hopper::rows_descriptor(shared.k[stage]);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      hopper::multiply<T, 0>(s, q[block], k + (block / 4 * kKeys * 8 + block % 4 * 2), block > 0);
    }
    hopper::commit_products();
  }

  template <int Blocks>
  __device__ void start_output(const uint32_t (&weights)[Blocks][4], bool add) {
    const auto v = hopper::columns_descriptor(shared.v[at.stage], kKeys * 128);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      hopper::multiply<T, 1>(o, weights[block], v + block * (2048 >> 4), add || block > 0);
    }
    hopper::commit_products();
  }

  // Values after the end of a packed sequence are another's: a weight of 0 does not help where they are not finite. Both warpgroups
  // write the same zeros, so that neither waits for the other.
  __device__ void clear_foreign_values(int tile) {
    if (!p.cu_seqlens_k || (tile + 1) * kKeys <= rows.keys) return;
    const int first = rows.keys - tile * kKeys;
    for (int i = threadIdx.x % hopper::kWarpgroup; i < (kKeys - first) * (D / 8); i += hopper::kWarpgroup) {
      const int row = first + i / (D / 8), packet = i % (D / 8);
      auto* panel = reinterpret_cast<unsigned char*>(shared.v[at.stage] + packet / 8 * kKeys * 64);
      *reinterpret_cast<uint4*>(panel + hopper::swizzled(row, packet % 8)) = uint4{0, 0, 0, 0};
    }
    hopper::fence_async_proxy();
    hopper::sync_threads(kCleared + warpgroup, hopper::kWarpgroup);
  }

  __device__ void release(uint64_t* empty) {
    __syncwarp();
    if (lane_id() == 0) hopper::arrive(empty);
  }

  // Logits to weights relative to the new peaks; returns how much earlier weights shrink.
  template <int Count>
  __device__ float2 absorb(float (&s)[Count], int tile) {
    auto& peak = rows.peak;
    auto& total = rows.total;
    if ((tile + 1) * kKeys > visible[0]) {
      const int column = tile * kKeys + lane_id() % 4 * 2;
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        if (column + i / 4 * 8 + i % 2 >= visible[i % 4 / 2]) s[i] = neg_inf<float>();
      }
    }
    float shrink[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = peak[row];
#pragma unroll
      for (int i = 0; i < Count / 4; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float base = top == neg_inf<float>() ? 0.0f : top * log2_scale;
      shrink[row] = exp2_approximate(peak[row] * log2_scale - base);
      peak[row] = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < Count / 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * row + e];
          x = exp2_approximate(fmaf(x, log2_scale, -base));
          sum += x;
        }
      }
      total[row] = total[row] * shrink[row] + sum;
    }
    return {shrink[0], shrink[1]};
  }

  __device__ void shrink_output(float2 by) {
    if (!__any_sync(kAllLanes, by.x != 1.0f || by.y != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= i % 4 < 2 ? by.x : by.y;
  }

  template <int Pending>
  __device__ void finish_output() {
    hopper::wait_products<Pending>();
    hopper::pin(o);
    release(&shared.v_empty[at.stage]);
  }

  // The first tile of an item, of which the warpgroup sees no more than 2 Count keys: nothing of it is left when the next one begins,
  // since the assembler follows no product across a branch.
  template <int Count>
  __device__ void attend_part() {
    float s[Count];
    uint32_t weights[Count / 8][4];
    start_logits(s, at.stage);
    hopper::wait_products<0>();
    hopper::pin(s);
    release(&shared.k_empty[at.stage]);
    absorb(s, tile);
    pack_operand<T>(weights, s);
    wait_values();
    clear_foreign_values(tile);
    start_output(weights, false);
    finish_output<0>();
  }
  // The same, whatever part it is; false if it is nothing and other tiles follow.
  __device__ bool attend_part() {
    const bool some = seen > 0 || tile == 0;
    wait_keys(at);
    if (!some) {
      release(&shared.k_empty[at.stage]);
      wait_values();
      release(&shared.v_empty[at.stage]);
    } else if (kKeys == 128 || seen <= 64) {
      attend_part<32>();
    } else {
      attend_part<64>();
    }
    at.advance();
    --tile;
    return some;
  }

  __device__ void run() {
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    bool begun = false;  // o holds earlier tiles of the item
    const auto take_logits = [&](int stage) {
      hopper::pin(s);
      release(&shared.k_empty[stage]);
      return absorb(s, tile);
    };
    const auto first_weights = [&] {
      hopper::wait_products<0>();
      const float2 shrink = take_logits(at.stage);
      pack_operand<T>(weights, s);
      wait_values();
      clear_foreign_values(tile);
      return shrink;
    };
    const auto first_tile = [&] {
      wait_keys(at);
      start_logits(s, at.stage);
      const float2 shrink = first_weights();
      if (begun) shrink_output(shrink);
    };
    // The logits of a tile are computed while the weights of the one before it meet their values.
    const auto next_weights = [&](Position next) {
      --tile;
      wait_keys(next);
      start_logits(s, next.stage);
      wait_values();
      start_output(weights, begun);
      hopper::wait_products<1>();
      const float2 shrink = take_logits(next.stage);
      // The assembler would otherwise put the wait before the exponentials, which are to overlap with what it waits for.
      __syncwarp(rows.total[0] + rows.total[1] < 0.0f ? 0u : kAllLanes);
      finish_output<0>();
      pack_operand<T>(weights, s);
      shrink_output(shrink);
      begun = true;
      at = next;
    };
    if constexpr (kAhead) {
      if (!take_item()) return;
      wait_keys(at);
      start_logits(s, at.stage);
      first_weights();
      Rows done;
      while (true) {
        auto next = at;
        next.advance();
        if (tile > 0) {
          next_weights(next);
          continue;
        }
        wait_values();
        done = rows;
        if (!take_item()) break;
        wait_keys(next);
        start_output(weights, begun);
        start_logits(s, next.stage);
        finish_output<1>();
        finish(done);
        at = next;
        first_weights();
        begun = false;
      }
      start_output(weights, begun);
      finish_output<0>();
      finish(done);
    } else if constexpr (D == 64) {
      // Everything stands here once: the ends of short items are mostly a matter of fetching instructions.
      bool any = false, waiting = false;  // whether there is an item, and weights that have not met their values
      while (true) {
        if (tile > 0) {
          auto next = at;
          next.advance();
          next_weights(next);
          continue;
        }
        if (waiting) {
          wait_values();
          start_output(weights, begun);
          finish_output<0>();
          at.advance();
        }
        if (any) finish(rows);
        if (!take_item()) return;
        any = true;
        begun = seen <= kKeys - 64 && attend_part();
        waiting = tile >= 0;
        if (waiting) first_tile();
      }
    } else {
      const auto start_item = [&] {
        while (take_item()) {
          begun = seen <= kKeys - 64 && attend_part();
          if (tile >= 0) {
            first_tile();
            return true;
          }
          finish(rows);
        }
        return false;
      };
      if (!start_item()) return;
      while (true) {
        auto next = at;
        next.advance();
        if (tile > 0) {
          next_weights(next);
          continue;
        }
        wait_values();
        start_output(weights, begun);
        finish_output<0>();
        finish(rows);
        at = next;
        if (!start_item()) return;
      }
    }
  }

  // Divides by the totals; writes lse.
  __device__ void normalize(Rows& done) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
      for (int row = 0; row < 2; ++row) done.total[row] += __shfl_xor_sync(kAllLanes, done.total[row], lanes);
    }
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) inverse[row] = done.total[row] > 0.0f ? __fdividef(1.0f, done.total[row]) : 0.0f;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= inverse[i % 4 / 2];
    if (!p.lse || lane_id() % 4 != 0) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int t = done.token + 8 * row;
      const float sum = done.total[row];
      const float lse = sum > 0.0f ? done.peak[row] * static_cast<float>(p.scale) + __logf(sum) : neg_inf<float>();
      if (t < done.queries) {
        static_cast<float*>(p.lse)[(static_cast<int64_t>(stream) * p.queries + done.output0 + t) * p.heads + done.head] = lse;
      }
    }
  }

  __device__ void store(const Rows& done, void* to) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int t = done.token + 8 * row;
      T* line = static_cast<T*>(to) + ((done.output0 + t) * p.heads + done.head) * D;
#pragma unroll
      for (int block = 0; block < D / 32; ++block) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = pack<T>(o[block * 16 + 4 * i + 2 * row], o[block * 16 + 4 * i + 2 * row + 1]);
        transpose_quad(x);
        if (t < done.queries) {
          *reinterpret_cast<uint4*>(line + block * 32 + lane_id() % 4 * 8) = uint4{x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

  // Rows that see no key.
  __device__ void store_nothing() const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int t = rows.token + 8 * row;
      if (t >= rows.queries) continue;
      const int64_t at = (rows.output0 + t) * p.heads + rows.head;
      const auto clear = [&](void* to) {
        if (!to) return;
        for (int block = 0; block < D / 32; ++block) {
          *reinterpret_cast<uint4*>(static_cast<T*>(to) + at * D + block * 32 + lane_id() % 4 * 8) = uint4{0, 0, 0, 0};
        }
      };
      if (p.lse && lane_id() % 4 == 0) static_cast<float*>(p.lse)[stream * p.queries * p.heads + at] = neg_inf<float>();
      if (stream == 1) {
        clear(p.o2);
      } else {
        clear(p.y);
        if (p.norm_weight) clear(p.diff);
      }
    }
  }

  __device__ void finish(Rows& done) {
    normalize(done);
    if (Streams == 2) {
      float* line = shared.second + threadIdx.x % hopper::kWarpgroup;
      if (stream == 1) {
        if (p.o2) store(done, p.o2);
        float lam[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int t = done.token + 8 * row;
          lam[row] = t < done.queries ? static_cast<const float*>(p.lam)[(done.output0 + t) * p.heads + done.head] : 0.0f;
        }
        hopper::wait(&shared.second_empty, second_parity ^ 1);
        second_parity ^= 1;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) line[i * hopper::kWarpgroup] = o[i] * lam[i % 4 / 2];
        hopper::arrive(&shared.second_full);
        return;
      }
      hopper::wait(&shared.second_full, second_parity);
      second_parity ^= 1;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] -= line[i * hopper::kWarpgroup];
      hopper::arrive(&shared.second_empty);
    }
    if (p.norm_weight) {
      if (p.diff) store(done, p.diff);
      const auto* weight = static_cast<const float*>(p.norm_weight) + lane_id() % 4 * 2;
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
        const float rstd = rsqrtf(square / D + static_cast<float>(p.norm_eps));
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          o[4 * i + 2 * row] *= rstd * weight[8 * i];
          o[4 * i + 2 * row + 1] *= rstd * weight[8 * i + 1];
        }
      }
    }
    store(done, p.y);
  }
};

template <class T, int D, int Streams>
__device__ inline void consume_tiles(const ForwardArguments& p, ForwardShared<T, D, Streams>& shared, int warpgroup) {
  Attend<T, D, Streams>(p, shared, warpgroup).run();
}

constexpr int kForwardThreads = hopper::kWarpgroup * (1 + kConsumers);

template <class T, int D, int Streams>
__global__ void __launch_bounds__(kForwardThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  using Shared = ForwardShared<T, D, Streams>;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int warpgroup = uniform(threadIdx.x / hopper::kWarpgroup);
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * hopper::kWarpgroup / kWarp;
    hopper::init_barrier(&shared.q_full, 1);
    hopper::init_barrier(&shared.q_empty, kConsumers * hopper::kWarpgroup);
    hopper::init_barrier(&shared.second_full, hopper::kWarpgroup);
    hopper::init_barrier(&shared.second_empty, hopper::kWarpgroup);
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      hopper::init_barrier(&shared.k_full[stage], 1);
      hopper::init_barrier(&shared.v_full[stage], 1);
      hopper::init_barrier(&shared.k_empty[stage], kWarps);
      hopper::init_barrier(&shared.v_empty[stage], kWarps);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    hopper::lower_registers<24>();
    if (threadIdx.x == 0) bring_tiles(p, shared);
  } else {
    hopper::raise_registers<240>();
    consume_tiles(p, shared, warpgroup - 1);
  }
}

template <class T, int D, int Streams>
cudaError_t launch_forward(const DiffAttentionForward& params, DType dtype, cudaStream_t stream) {
  using Shared = ForwardShared<T, D, Streams>;
  ForwardArguments p{};
  static_cast<DiffAttentionForward&>(p) = params;
  int multiprocessors = 0;
  auto status = multiprocessor_count(multiprocessors);
  if (status != cudaSuccess) return status;
  p.schedule = make_schedule(p, Shared::kTokens, multiprocessors);
  const bool packed = p.cu_seqlens_q != nullptr;
  const auto map = [&](CUtensorMap& to, const void* base, const Strides& strides, int heads, int64_t tokens, int rows) {
    return make_tensor_map(to, base, dtype, head_tile(D, heads, tokens, packed ? 1 : p.sequences, strides, rows));
  };
  status = map(p.q_map, p.q, p.q_strides, p.heads, packed ? p.queries : p.length_q, Shared::kTokens);
  if (status == cudaSuccess && p.keys > 0) {
    status = map(p.k_map, p.k, p.k_strides, p.kv_heads, packed ? p.keys : p.length_k, Shared::kKeys);
    if (status == cudaSuccess) status = map(p.v_map, p.v, p.v_strides, p.kv_heads, packed ? p.keys : p.length_k, Shared::kKeys);
  }
  if (status != cudaSuccess) return status;
  return launch(forward_kernel<T, D, Streams>, dim3(p.schedule.blocks), kForwardThreads, sizeof(Shared), stream, p);
}

template <int D>
cudaError_t launch_forward_d(const DiffAttentionForward& params, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) {
    return params.streams == 2 ? launch_forward<__nv_bfloat16, D, 2>(params, dtype, stream)
                               : launch_forward<__nv_bfloat16, D, 1>(params, dtype, stream);
  }
  return params.streams == 2 ? launch_forward<__half, D, 2>(params, dtype, stream)
                             : launch_forward<__half, D, 1>(params, dtype, stream);
}

}  // namespace coda::kernels::sm90
