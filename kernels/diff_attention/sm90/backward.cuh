#pragma once

// grad_k and grad_v of a block of keys, and its share of grad_q. Two warpgroups of 64 keys each; the rows of their accumulators
// are keys, so that weights and their gradients come out as register operands of the products that sum over queries. With D 128 they
// bring the tiles of queries themselves: a warp for that alone would leave 240 registers to the others, who need 255. README.md has
// the mathematics.

#include <algorithm>
#include <climits>

#include "bring_queries.cuh"

namespace coda::kernels::sm90 {

// From kFull on, one for each warpgroup.
enum BackwardBarrier { kCleared = 1, kFull = 2, kFree = 4, kTheta = 6, kTurn = 8 };

// One warpgroup. Its share of grad_q is a panel of 64 columns from all keys of the block with D 128, all columns from its own
// keys with D 64.
template <class T, int D, int Streams>
struct KeyGradients {
  using Shared = BackwardShared<T, D, Streams>;
  static constexpr bool kExchange = D == 128;
  static constexpr int kStages = Shared::kStages;
  static constexpr int kPanelKeys = kExchange ? kKeyBlock : kOwnKeys;
  struct Sums {
    float x[32];
  };
  using Operand = uint32_t[kQueryTile / 16][4];

  const BackwardArguments& p;
  Shared& shared;
  const int thread, quad;
  // Which warpgroup, which stage is at work, and where shared memory begins. Set anew in each turn of the loop by what tells
  // the compiler that they are the same in a warp, as operands of products must be. It would otherwise compute all operands
  // before the loop, and have no registers to keep them in.
  int warpgroup, now;
  uint32_t origin;
  int seen_from;  // queries from here on see all keys of the warpgroup
  int tile0;      // of the sequence
  int first_tile, end_tile;  // of each head
  float grad_k[D / 2], grad_v[D / 2];

  __device__ KeyGradients(const BackwardArguments& arguments, Shared& s)
      : p(arguments), shared(s), thread(threadIdx.x % hopper::kWarpgroup), quad(thread % 4) {
    turn(0);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) grad_k[i] = grad_v[i] = 0.0f;
    if constexpr (Streams == 2) {
      for (int j = 0; j < 4; ++j) theta_sums()[j * hopper::kWarpgroup] = float2{0.0f, 0.0f};
    }
    const KeyBlock& block = shared.block;
    const int end = block.begin + (warpgroup + 1) * kOwnKeys;
    seen_from = uniform(end > block.keys ? INT_MAX : end - 1 - block.shift);
    tile0 = uniform(block.query_tile0);
    first_tile = uniform(block.first);
    end_tile = uniform(block.first + block.tiles);
  }

  __device__ void turn(int n) {
    const uint32_t mine = threadIdx.x / hopper::kWarpgroup * 4 + n % kStages;
    const uint32_t known = __reduce_max_sync(kAllLanes, (shared_address(&shared) & 0x3ffff) + mine);
    warpgroup = known / 4 % 2;
    now = known % 4;
    origin = known & ~1023u;
  }
  __device__ int panel() const { return kExchange ? warpgroup : 0; }  // of grad_q

  // Rows after the end of a packed sequence are another's: a weight of 0 does not help where they are not finite.
  __device__ void clear_foreign_rows() {
    const int first = shared.block.keys - shared.block.begin;
    if (!p.cu_seqlens_k || first >= kKeyBlock) return;
    const uint4 zero{0, 0, 0, 0};
    for (int i = threadIdx.x; i < (kKeyBlock - first) * (D / 8); i += 2 * hopper::kWarpgroup) {
      const int row = first + i / (D / 8), packet = i % (D / 8);
      reinterpret_cast<uint4*>(shared.k)[(packet / 4 * kKeyBlock + row) * 4 + packet % 4] = zero;
      reinterpret_cast<uint4*>(shared.v)[(packet / 8 * kKeyBlock + row) * 8 + packet % 8] = zero;
    }
    hopper::fence_async_proxy();
    hopper::sync_threads(kCleared, 2 * hopper::kWarpgroup);
  }

  // Where a tile of queries lies: q, R_theta q or, after them, grad_diff.
  __device__ uint32_t tile_address(int stage, int which) const {
    return origin + offsetof(Shared, stages) + stage * sizeof(typename Shared::Stage) + which * (kQueryTile * D * sizeof(T));
  }

  // Numbers of a tile's queries, for the columns of a thread: those that sums begin with are the same for all elements of a column,
  // which saves an addition to each element later.
  using Numbers = float4[4];
  __device__ void load_numbers(Numbers& to, int stage, QueryNumber which) const {
#pragma unroll
    for (int step = 0; step < 4; ++step) to[step] = number(stage, which, step);
  }
  __device__ void begin_with(Sums& s, const Numbers& numbers) const {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        s.x[8 * step + 2 * row] = numbers[step].x;
        s.x[8 * step + 2 * row + 1] = numbers[step].y;
        s.x[8 * step + 4 + 2 * row] = numbers[step].z;
        s.x[8 * step + 4 + 2 * row + 1] = numbers[step].w;
      }
    }
  }

  // s += keys times the rows of a tile
  __device__ void start_logits(Sums& s, int stage, int stream) const {
    const auto keys = hopper::rows_descriptor<64>(origin + offsetof(Shared, k) + warpgroup * (kOwnKeys * 64));
    const auto rows = hopper::rows_descriptor(tile_address(stage, stream));
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      hopper::multiply<T, 0, 0>(s.x, keys + (step / 2 * (kKeyBlock * 64 >> 4) + step % 2 * 2),
                                rows + (step / 4 * (kQueryTile * 128 >> 4) + step % 4 * 2), true);
    }
    hopper::commit_products();
  }

  // s += values times the rows of grad_diff
  __device__ void start_grad_weights(Sums& s, int stage) const {
    const auto values = hopper::rows_descriptor(origin + offsetof(Shared, v) + warpgroup * (kOwnKeys * 128));
    const auto rows = hopper::rows_descriptor(tile_address(stage, Streams));
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      hopper::multiply<T, 0, 0>(s.x, values + (step / 4 * (kKeyBlock * 128 >> 4) + step % 4 * 2),
                                rows + (step / 4 * (kQueryTile * 128 >> 4) + step % 4 * 2), true);
    }
    hopper::commit_products();
  }

  // sum += operand times a tile of the stage at work, summed over queries
  __device__ void multiply_tile(float (&sum)[D / 2], const Operand& operand, int which) const {
    const auto columns = hopper::columns_descriptor(tile_address(now, which), kQueryTile * 128);
#pragma unroll
    for (int step = 0; step < kQueryTile / 16; ++step) {
      hopper::multiply<T, 1>(sum, operand[step], columns + step * (2048 >> 4), true);
    }
  }

  __device__ void start_grad_q(Sums& grad_q, int which, bool add) const {
    const int first = kExchange ? 0 : warpgroup * kOwnKeys;
    const auto grad_logits = hopper::columns_descriptor(
        origin + offsetof(Shared, grad_logits) + (which * kKeyBlock + first) * 128, 16);
    const auto keys = hopper::columns_descriptor<64>(origin + offsetof(Shared, k) + (panel() * kKeyBlock + first) * 64,
                                                     D / 64 * kKeyBlock * 64);
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < kPanelKeys / 16; ++step) {
      hopper::multiply<T, 1, 1>(grad_q.x, grad_logits + step * (2048 >> 4), keys + step * (1024 >> 4), add || step > 0);
    }
    hopper::commit_products();
  }

  // Four of a tile's numbers: for queries 16 step + 2 quad, the next one, and those eight further.
  __device__ float4 number(int stage, QueryNumber which, int step) const {
    return reinterpret_cast<const float4*>(shared.numbers[stage])[which * (kQueryTile / 4) + step * 4 + quad];
  }

  // Logits of queries that do not see a key become -inf.
  __device__ void hide(float (&s)[32], int tile) const {
    if (tile * kQueryTile >= seen_from) return;
    const int own = shared.block.begin + warpgroup * kOwnKeys + thread / kWarp * 16 + thread % kWarp / 4;
    const int column = tile * kQueryTile + shared.block.shift + quad * 2, keys = shared.block.keys;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int key = own + i % 4 / 2 * 8;
      if (key >= keys || key > column + i / 4 * 8 + i % 2) s[i] = neg_inf<float>();
    }
  }

  __device__ void weigh(Operand& weights, const float (&s)[32]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      weights[i / 4][i % 4] = pack<T>(exp2_approximate(s[2 * i] * p.log2_scale), exp2_approximate(s[2 * i + 1] * p.log2_scale));
    }
  }

  __device__ void load_signs(uint4 (&to)[2], int stage) const {
    const auto* signs = reinterpret_cast<const uint4*>(shared.numbers[stage] + kSigns * kQueryTile) + quad * 2;
    to[0] = signs[0];
    to[1] = signs[1];
  }
  // |lambda| P2 to -lambda P2.
  __device__ void apply_signs(Operand& weights, const uint4 (&signs)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[2 * half][i] ^= i < 2 ? signs[half].x : signs[half].y;
        weights[2 * half + 1][i] ^= i < 2 ? signs[half].z : signs[half].w;
      }
    }
  }

  // The assembler would otherwise work out the weights later, after waits that they are to overlap with.
  __device__ void keep_before(const Operand& weights) const {
    uint32_t all = ~0u;
#pragma unroll
    for (int i = 0; i < 16; ++i) all &= weights[i / 4][i % 4];
    __syncwarp(all == ~0u ? 0u : kAllLanes);
  }

  // Gradients of the logits of either stream, from those of the weights less D1.
  __device__ void grade_first(Operand& to, const Operand& weights, const float (&grad_weights)[32]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 weight = unpack<T>(weights[i / 4][i % 4]);
      to[i / 4][i % 4] = pack<T>(weight.x * grad_weights[2 * i], weight.y * grad_weights[2 * i + 1]);
    }
  }
  __device__ void grade_second(Operand& to, const Operand& weights, const float (&grad_weights)[32],
                               const Numbers& change) const {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = grad_weights + step * 8 + 2 * i;
        const float2 weight = unpack<T>(weights[step][i]);
        to[step][i] = pack<T>(weight.x * (x[0] + (i < 2 ? change[step].x : change[step].z)),
                              weight.y * (x[1] + (i < 2 ? change[step].y : change[step].w)));
      }
    }
  }

  // Packets that differ in bits of their number differ in these bits of the swizzled offset.
  __device__ void share_grad_logits(T* to, const Operand& from) const {
    const int offset = hopper::swizzled(warpgroup * kOwnKeys + thread / kWarp * 16 + thread % 16, thread % kWarp / 16);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      store_matrices(reinterpret_cast<unsigned char*>(to) + (offset ^ step << 5), from[step][0], from[step][1],
                             from[step][2], from[step][3]);
    }
  }

  using TurnedRows = uint32_t[4][4];  // of R_theta q: rows of a half, then of the other
  // Of this thread: four, a warpgroup's threads apart.
  __device__ float2* theta_sums() const {
    return reinterpret_cast<float2*>(shared.theta_sums) + warpgroup * 4 * hopper::kWarpgroup + thread;
  }
  __device__ void load_turned(TurnedRows& rows, int stage) const {
    const int column = panel_column(D, panel(), 0, 0) + thread % kWarp / 16 * (D / 2);
    const int offset = column / 64 * (kQueryTile * 128) + hopper::swizzled(thread / kWarp * 16 + thread % 16, column % 64 / 8);
    const auto* tile = reinterpret_cast<const unsigned char*>(shared.stages[stage].q[Streams - 1]);
#pragma unroll
    for (int j = 0; j < 4; ++j) load_matrices(rows[j], tile + (offset ^ j << 4));
  }

  // grad_q of the second stream, in the coordinates of R_theta q, back to those of q; its part of grad_theta on the way.
  template <bool Interleaved>
  __device__ void turn_back(float (&grad_q)[32], const TurnedRows& rows, int stage) {
    const auto* angles = reinterpret_cast<const float4*>(shared.angles[stage]) + (panel() * 4 + quad) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 angle = angles[j];
      const auto& turned = rows[j];
      float2 grad_theta = theta_sums()[j * hopper::kWarpgroup];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 low = unpack<T>(turned[r]), high = unpack<T>(turned[2 + r]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float& a = grad_q[4 * j + 2 * r + (Interleaved ? 16 * m : m)];
          float& b = grad_q[4 * j + 2 * r + (Interleaved ? 16 * m + 1 : 16 + m)];
          const float turned_a = Interleaved ? (m ? high.x : low.x) : (m ? low.y : low.x);
          const float turned_b = Interleaved ? (m ? high.y : low.y) : (m ? high.y : high.x);
          const float cosine = m ? angle.z : angle.x, sine = m ? angle.w : angle.y;
          (m ? grad_theta.y : grad_theta.x) += b * turned_a - a * turned_b;
          const float back = a * cosine + b * sine;
          b = b * cosine - a * sine;
          a = back;
        }
      }
      theta_sums()[j * hopper::kWarpgroup] = grad_theta;
    }
  }

  // Sums over the queries of a head, and starts anew.
  __device__ void store_grad_theta(int head) {
    const int warp = thread / kWarp;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 sum = theta_sums()[j * hopper::kWarpgroup];
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        sum.x += __shfl_xor_sync(kAllLanes, sum.x, lanes);
        sum.y += __shfl_xor_sync(kAllLanes, sum.y, lanes);
      }
      if (thread % kWarp < 4) reinterpret_cast<float2*>(shared.theta[warpgroup][warp])[quad * 4 + j] = sum;
      theta_sums()[j * hopper::kWarpgroup] = float2{0.0f, 0.0f};
    }
    hopper::sync_threads(kTheta + warpgroup, hopper::kWarpgroup);
    if (thread < 32) {
      const auto& part = shared.theta[warpgroup];
      const int pair = panel_pair(D, p.theta_interleaved, panel(), thread / 8, thread / 2 % 4, thread % 2);
      const int share = kExchange ? shared.block.share : shared.block.share * 2 + warpgroup;
      static_cast<float*>(p.theta_partial)[(static_cast<int64_t>(share) * p.heads + head) * (D / 2) + pair] =
          (part[0][thread] + part[1][thread] + part[2][thread] + part[3][thread]) * static_cast<float>(p.scale);
    }
  }

  // A deterministic order of blocks would be kept here.
  __device__ void add_to_sums(TilePlace at, const float (&grad_q)[32]) const {
    const int64_t index = at.head * p.tiles + tile0 + at.tile;
    float* sums = p.grad_q_sums + index * (kQueryTile * D) + panel() * (kQueryTile * 64) + thread * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + j * 512), "f"(grad_q[4 * j]),
                   "f"(grad_q[4 * j + 1]), "f"(grad_q[4 * j + 2]), "f"(grad_q[4 * j + 3])
                   : "memory");
    }
  }

  // Brings the tile that comes kStages after tile n, to its stage, as soon as all have done with tile n.
  __device__ void bring_later(TilePlace after, int n, int copy) const {
    hopper::wait(&shared.empty[now], n / kStages % 2);
    for (int i = 1; i < kStages; ++i) after.advance(first_tile, end_tile);
    if (copy < shared.kCopies && hopper::elect_thread()) bring_queries(p, shared, after, now, copy);
  }

  // A product is under way nearly all the time: each wait leaves the group committed last unfinished, and what follows the wait runs
  // beside that group. Shared memory answers late, being busy with operands of products, so what a phase reads there is asked for
  // before the wait that it begins with. Only at the end of a turn of the loop does nothing remain, since ptxas follows no group
  // around a loop.
  __device__ void run() {
    hopper::wait(&shared.keys_full, 0);
    clear_foreign_rows();
    const int count = p.heads / p.kv_heads * (end_tile - first_tile);
    if (count <= 0) return;
    TilePlace at{uniform(shared.block.kv_head) * (p.heads / p.kv_heads), first_tile};
    Sums s;
    Numbers shift1, shift2, delta;
    Operand first;
    hopper::wait(&shared.full[0], 0);
    load_numbers(shift1, 0, kShift1);
    begin_with(s, shift1);
    start_logits(s, 0, 0);
    load_numbers(delta, 0, kNegativeDelta1);
    if constexpr (Streams == 2) load_numbers(shift2, 0, kShift2);
    hopper::wait_products<0>();
    hopper::pin(s.x);
    hide(s.x, at.tile);
    weigh(first, s.x);
    if constexpr (Streams == 2) {
      begin_with(s, shift2);
      start_logits(s, 0, 1);
      hopper::wait_products<0>();
      hopper::pin(s.x);
    }
    for (int n = 0; n < count; ++n) {
      // Here are the first weights of this tile, the logits of its second stream, and -D1.
      turn(n);
      const int next = (now + 1) % kStages;
      TilePlace after = at;
      after.advance(first_tile, end_tile);
      if constexpr (kExchange) hopper::arrive_threads(kFree + (warpgroup ^ 1), 2 * hopper::kWarpgroup);
      uint4 signs[2];
      if constexpr (Streams == 2) load_signs(signs, now);
      Sums grad_weights;
      begin_with(grad_weights, delta);
      start_grad_weights(grad_weights, now);
      Operand second, difference;
      if constexpr (Streams == 2) {
        hide(s.x, at.tile);
        weigh(second, s.x);
        apply_signs(second, signs);
#pragma unroll
        for (int i = 0; i < 16; ++i) difference[i / 4][i % 4] = add_packed<T>(first[i / 4][i % 4], second[i / 4][i % 4]);
      }
      hopper::begin_products();
      multiply_tile(grad_v, Streams == 2 ? difference : first, Streams);
      hopper::commit_products();
      Numbers change;
      if constexpr (Streams == 2) load_numbers(change, now, kDeltaChange);
      hopper::wait_products<1>();
      hopper::pin(grad_weights.x);
      Operand grad_first, grad_second;
      grade_first(grad_first, first, grad_weights.x);
      if constexpr (Streams == 2) grade_second(grad_second, second, grad_weights.x, change);
      hopper::begin_products();
      multiply_tile(grad_k, grad_first, 0);
      if constexpr (Streams == 2) multiply_tile(grad_k, grad_second, 1);
      hopper::commit_products();
      // After the last tile what is done for the next one is of no use, and harms nothing.
      if (n + 1 < count) hopper::wait(&shared.full[next], (n + 1) / kStages % 2);
      Sums next_s;
      load_numbers(shift1, next, kShift1);
      if constexpr (Streams == 1) {
        begin_with(next_s, shift1);
        start_logits(next_s, next, 0);
      }
      hopper::sync_threads(kFree + warpgroup, (kExchange ? 2 : 1) * hopper::kWarpgroup);
      share_grad_logits(shared.grad_logits[0], grad_first);
      if constexpr (Streams == 2) share_grad_logits(shared.grad_logits[1], grad_second);
      hopper::fence_async_proxy();
      hopper::sync_threads(kFull + (kExchange ? 0 : warpgroup), (kExchange ? 2 : 1) * hopper::kWarpgroup);
      Sums grad_q;
      start_grad_q(grad_q, Streams - 1, false);
      hopper::wait_products<1>();
      hopper::pin(grad_k);
      hopper::pin(grad_v);
      if constexpr (Streams == 2) {
        begin_with(next_s, shift1);
        start_logits(next_s, next, 0);
        TurnedRows turned;
        load_turned(turned, now);
        hopper::wait_products<1>();
        hopper::pin(grad_q.x);
        if (p.theta_interleaved) {
          turn_back<true>(grad_q.x, turned, now);
        } else {
          turn_back<false>(grad_q.x, turned, now);
        }
        start_grad_q(grad_q, 0, true);
      }
      hopper::arrive(&shared.empty[now]);
      hopper::wait_products<1>();
      hopper::pin(next_s.x);
      hide(next_s.x, after.tile);
      weigh(first, next_s.x);
      if constexpr (Streams == 2) load_numbers(shift2, next, kShift2);
      keep_before(first);
      if constexpr (Streams == 2) {
        begin_with(s, shift2);
        start_logits(s, next, 1);
      }
      // These adds keep their registers for a while, which is why they come as early as they can.
      if constexpr (Streams == 2) {
        hopper::wait_products<1>();
        hopper::pin(grad_q.x);
        add_to_sums(at, grad_q.x);
      }
      if constexpr (!has_producer(D)) {
        if (n + kStages < count) bring_later(after, n, warp_id());
      }
      load_numbers(delta, next, kNegativeDelta1);
      hopper::wait_products<0>();
      if constexpr (Streams == 1) {
        hopper::pin(grad_q.x);
        add_to_sums(at, grad_q.x);
      }
      hopper::pin(s.x);
      if constexpr (Streams == 2) {
        if (at.head != after.head) store_grad_theta(at.head);
      }
      at = after;
    }
  }

  // One stream with D 128. Products are issued only as fast as they are computed, and keep their warps from everything else meanwhile. So
  // the warpgroups take turns: one has all products of a tile computed, without a pause, while the other does what lies between
  // them. That leaves grad_q to the turn after, when both have shared what it is made of.
  __device__ void run_in_turns() {
    hopper::wait(&shared.keys_full, 0);
    clear_foreign_rows();
    const int count = p.heads / p.kv_heads * (end_tile - first_tile);
    if (count <= 0) return;
    TilePlace at{uniform(shared.block.kv_head) * (p.heads / p.kv_heads), first_tile}, before = at;
    if (warpgroup == 1) hopper::arrive_threads(kTurn, 2 * hopper::kWarpgroup);
    Operand weights, grad_logits;
    {
      Sums s, grad_weights;
      Numbers shift, delta;
      hopper::wait(&shared.full[0], 0);
      load_numbers(shift, 0, kShift1);
      load_numbers(delta, 0, kNegativeDelta1);
      begin_with(s, shift);
      start_logits(s, 0, 0);
      hopper::wait_products<0>();
      hopper::pin(s.x);
      hide(s.x, at.tile);
      weigh(weights, s.x);
      begin_with(grad_weights, delta);
      start_grad_weights(grad_weights, 0);
      hopper::wait_products<0>();
      hopper::pin(grad_weights.x);
      grade_first(grad_logits, weights, grad_weights.x);
      share_grad_logits(shared.grad_logits[0], grad_logits);
      hopper::fence_async_proxy();
    }
    for (int n = 0; n < count; ++n) {
      // Here are the weights of this tile and the gradients of its logits, shared as well. After the last tile what is done for the
      // next one is of no use, and harms nothing; nor does grad_q before the first.
      turn(n);
      const int next = (now + 1) % kStages, last = (now + kStages - 1) % kStages;
      TilePlace after = at;
      after.advance(first_tile, end_tile);
      if (n + 1 < count) hopper::wait(&shared.full[next], (n + 1) / kStages % 2);
      Numbers shift, delta;
      load_numbers(shift, next, kShift1);
      hopper::sync_threads(kTurn + warpgroup, 2 * hopper::kWarpgroup);
      hopper::begin_products();
      multiply_tile(grad_v, weights, 1);
      multiply_tile(grad_k, grad_logits, 0);
      hopper::commit_products();
      Sums grad_q, s, grad_weights;
      begin_with(s, shift);
      start_logits(s, next, 0);
      hopper::wait_products<1>();
      hopper::pin(grad_k);
      hopper::pin(grad_v);
      start_grad_q(grad_q, last, false);
      load_numbers(delta, next, kNegativeDelta1);
      begin_with(grad_weights, delta);
      start_grad_weights(grad_weights, next);
      // With grad_q complete, its grad_logits may be overwritten by who has the turn after the other's.
      hopper::wait_products<1>();
      hopper::pin(s.x);
      hopper::pin(grad_q.x);
      hopper::arrive_threads(kTurn + (warpgroup ^ 1), 2 * hopper::kWarpgroup);
      hopper::arrive(&shared.empty[now]);
      if (n > 0) add_to_sums(before, grad_q.x);
      hide(s.x, after.tile);
      weigh(weights, s.x);
      keep_before(weights);
      // The second warpgroup, whose turn is later, finds the stage empty.
      if (warpgroup == 1 && n + kStages < count) {
        for (int copy = warp_id() % 4; copy < shared.kCopies; copy += 4) bring_later(after, n, copy);
      }
      hopper::wait_products<0>();
      hopper::pin(grad_weights.x);
      grade_first(grad_logits, weights, grad_weights.x);
      share_grad_logits(shared.grad_logits[next], grad_logits);
      hopper::fence_async_proxy();
      before = at;
      at = after;
    }
    if (warpgroup == 0) hopper::sync_threads(kTurn, 2 * hopper::kWarpgroup);
    Sums grad_q;
    start_grad_q(grad_q, now, false);
    hopper::wait_products<0>();
    hopper::pin(grad_q.x);
    add_to_sums(before, grad_q.x);
  }

  __device__ void store(void* to, const float (&grad)[D / 2], float scale) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int key = shared.block.begin + warpgroup * kOwnKeys + thread / kWarp * 16 + thread % kWarp / 4 + 8 * row;
      T* line = static_cast<T*>(to) + ((shared.block.key0 + key) * p.kv_heads + shared.block.kv_head) * D;
#pragma unroll
      for (int part = 0; part < D / 32; ++part) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = pack<T>(grad[part * 16 + 4 * i + 2 * row] * scale, grad[part * 16 + 4 * i + 2 * row + 1] * scale);
        }
        transpose_quad(x);
        if (key < shared.block.keys) *reinterpret_cast<uint4*>(line + part * 32 + quad * 8) = uint4{x[0], x[1], x[2], x[3]};
      }
    }
  }
};

template <class T, int D, int Streams>
__device__ inline void find_gradients(const BackwardArguments& p, BackwardShared<T, D, Streams>& shared) {
  KeyGradients<T, D, Streams> gradients(p, shared);
  if constexpr (take_turns(D, Streams)) {
    gradients.run_in_turns();
  } else {
    gradients.run();
  }
  gradients.store(p.grad_k, gradients.grad_k, static_cast<float>(p.scale));
  gradients.store(p.grad_v, gradients.grad_v, 1.0f);
}

constexpr int key_block_threads(int dim) { return (has_producer(dim) ? 3 : 2) * hopper::kWarpgroup; }

template <class T, int D, int Streams>
__global__ void __launch_bounds__(key_block_threads(D), 1) key_blocks_kernel(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<T, D, Streams>*>(memory);
  if (threadIdx.x < kWarp && hopper::elect_thread()) {
    KeyBlock& block = shared.block;
    block.find(p);
    hopper::init_barrier(&shared.keys_full, 1);
    for (int stage = 0; stage < shared.kStages; ++stage) {
      hopper::init_barrier(&shared.full[stage], 1);
      hopper::init_barrier(&shared.empty[stage], 2 * hopper::kWarpgroup);
    }
    hopper::fence_barrier_init();
    if (block.begin < block.keys) {
      bring_keys(p, shared);
    }
  }
  __syncthreads();
  if (shared.block.begin >= shared.block.keys) return;
  if constexpr (has_producer(D)) {
    if (threadIdx.x >= 2 * hopper::kWarpgroup) {
      hopper::lower_registers<40>();
      if (warp_id() == 2 * hopper::kWarpgroup / kWarp) bring_all_queries(p, shared);
    } else {
      hopper::raise_registers<232>();
      find_gradients(p, shared);
    }
  } else {
    const int tiles = p.heads / p.kv_heads * shared.block.tiles, copy = warp_id();
    TilePlace place{shared.block.kv_head * (p.heads / p.kv_heads), shared.block.first};
    for (int stage = 0; stage < shared.kStages && stage < tiles; ++stage) {
      if (copy < shared.kCopies && hopper::elect_thread()) bring_queries(p, shared, place, stage, copy);
      place.advance(shared.block.first, shared.block.first + shared.block.tiles);
    }
    find_gradients(p, shared);
  }
}

template <class T, int D>
cudaError_t launch_key_blocks(const BackwardArguments& p, cudaStream_t stream) {
  const int64_t blocks =
      p.cu_seqlens_k ? tile_bound(p.keys, p.sequences, kKeyBlock) : p.sequences * ((p.length_k + kKeyBlock - 1) / kKeyBlock);
  const dim3 grid(static_cast<unsigned>(blocks * p.kv_heads));
  const int64_t of_unit = p.cu_seqlens_k ? blocks : blocks / p.sequences;
  int multiprocessors = 0;
  const auto status = multiprocessor_count(multiprocessors);
  if (status != cudaSuccess) return status;
  BackwardArguments arguments = p;
  arguments.section = static_cast<unsigned>(std::max<int64_t>(multiprocessors / of_unit, 1));
  return p.streams == 2
             ? launch(key_blocks_kernel<T, D, 2>, grid, key_block_threads(D), sizeof(BackwardShared<T, D, 2>), stream, arguments)
             : launch(key_blocks_kernel<T, D, 1>, grid, key_block_threads(D), sizeof(BackwardShared<T, D, 1>), stream, arguments);
}

}  // namespace coda::kernels::sm90
