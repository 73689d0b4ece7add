#pragma once

// One block: a warpgroup that brings queries, keys and values, and two that attend. With two streams such a warpgroup
// has 32 query rows twice, in q and in R_theta q; with one, 64. README.md has the reasons.

#include "../../common/wgmma.cuh"
#include "../../diff_attention/sm90/tiles.cuh"
#include "bring.cuh"

namespace coda::kernels::sm90::bounded {

__device__ inline Angle<float> angle_of_theta(float theta) {
  const float turns = rintf(theta * 0.15915494f);
  const float x = fmaf(turns, 1.7484555e-7f, fmaf(turns, -6.2831855f, theta));
  return {__cosf(x), __sinf(x)};
}

// One warpgroup that attends: an online softmax for each item. Tiles of all items run in one stream, so that the first
// logits of an item are computed while the one before it ends. A thread has two rows of every product, eight apart:
// with two streams they are one query in both, so that o1 - lam o2 and its norm need nobody else.
template <class T, int D, int Streams>
struct Attend {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kOwn = 2 / Streams;  // query rows of a thread
  const Arguments& p;
  Memory& shared;
  unsigned items = 0;

  struct Rows {
    uint32_t line[kOwn];  // token * H + head; kNoLine past the end of the chunk
    float total[2];       // of this thread's columns; after the item's last tile, the inverse of all columns'
    uint32_t lam;         // the bits of it, which have not come yet
    float ratio;          // after the last tile: see finish
  };
  static constexpr uint32_t kNoLine = 0xffffffffu;
  Rows rows;
  float peak[2];
  int visible[kOwn];                     // leading keys of the window that each row sees
  int tiles, window_tiles, step, flags;  // of the item, and where it is
  int theta_head = -1;
  const Angle<float>* theta;  // of this thread's row

  uint32_t q[D / 16][4];
  float o[D / 2];

  __device__ Attend(const Arguments& arguments, Memory& memory) : p(arguments), shared(memory) {}

  __device__ int tile() const { return flags & Item::kBackwards ? tiles - 1 - step : step; }
  __device__ bool at_bank() const { return tile() >= window_tiles; }
  // The item's next tile is the first that its queries meet turned, or not turned.
  __device__ bool queries_change() const {
    return p.turns_queries && step + 1 == (flags & Item::kBackwards ? tiles - window_tiles : window_tiles);
  }

  __device__ static int consumer() { return threadIdx.x / hopper::kWarpgroup - 1; }
  // This thread's first row within an item.
  __device__ static int row0() { return (warp_id() - kBringers) * 8 * kOwn + lane_id() / 4; }

  // Where the keys and values of a tile are, in one register.
  struct Position {
    int packed;
    __device__ int stage() const { return packed >> 2; }
    __device__ uint32_t parity() const { return packed & 1; }
    __device__ bool keep() const { return packed & 2; }  // for the next item
  };
  Ring<Memory::kStages> ring;
  __device__ Position next_position() {
    ring.advance(ring.fresh(flags & Item::kFollows, step));
    return {ring.stage << 2 | ring.keeps(flags & Item::kFollowed, step, tiles) << 1 | static_cast<int>(ring.parity())};
  }

  __device__ static void release(uint64_t* empty, bool really = true) {
    __syncwarp();
    hopper::arrive_if(empty, really && lane_id() == 0);
  }

  // False after the last item. Its queries have come.
  __device__ bool take_item() {
    const Item& item = shared.item[items++ % kItems];
    step = 0;
    tiles = item.tiles;
    if (tiles == 0) return false;
    window_tiles = item.window_tiles;
    flags = item.flags;
    ring.begin(flags & Item::kFollows);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      peak[i] = neg_inf<float>();
      rows.total[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int r = item.row0 + row0() + 8 * i;
      const auto at = p.split(r);
      const bool real = r < item.rows;
      rows.line[i] = real ? item.line0 + at.token * p.heads + at.head : kNoLine;
      if (Streams == 2) rows.lam = real ? bits_at(p.lam, p.narrow_lam, rows.line[i]) : 0;
      visible[i] = item.seen + at.token + 1;
      if (Streams == 2) {
        int place = item.kv_head * p.group + at.head;
        if (p.heads > Memory::kRows) {
          if (item.kv_head != theta_head || p.group > kThetaRows) write_theta(item);
          place = consumer() * kThetaRows + (p.group > kThetaRows ? row0() % kThetaRows : at.head);
        }
        theta = shared.theta + place * Memory::kThetaStride;
      }
    }
    return true;
  }

  // Of an input that may be of the storage type: asking for it and making a number of it, for which the load is waited for.
  __device__ static uint32_t bits_at(const void* from, bool narrow, uint32_t i) {
    return narrow ? static_cast<const uint16_t*>(from)[i] : static_cast<const uint32_t*>(from)[i];
  }
  __device__ static float number_of(uint32_t bits, bool narrow) {
    return narrow ? unpack<T>(bits).x : __uint_as_float(bits);
  }

  // The angles of all heads.
  __device__ void write_thetas() const {
    constexpr int kThreads = kConsumers * hopper::kWarpgroup, kAtOnce = 8;
    const int angles = p.heads * (D / 2);
#pragma unroll 1
    for (int first = threadIdx.x - kBringers * kWarp; first < angles; first += kAtOnce * kThreads) {
      uint32_t bits[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) bits[j] = bits_at(p.theta, p.narrow_theta, min(first + j * kThreads, angles - 1));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kThreads;
        if (i >= angles) break;
        shared.theta[i / (D / 2) * Memory::kThetaStride + i % (D / 2)] = angle_of_theta(number_of(bits[j], p.narrow_theta));
      }
    }
    hopper::sync_threads(kThetas, kThreads);
  }
  // The angles of the heads of a group, or of this warpgroup's rows where those are fewer.
  static constexpr int kThetaRows = Memory::kRows / kConsumers;
  __device__ void write_theta(const Item& item) {
    theta_head = item.kv_head;
    hopper::sync_threads(kTheta + consumer(), hopper::kWarpgroup);
    const bool by_row = p.group > kThetaRows;
    for (int i = threadIdx.x % hopper::kWarpgroup; i < (by_row ? kThetaRows : p.group) * (D / 2);
         i += hopper::kWarpgroup) {
      const int place = i / (D / 2), pair = i % (D / 2);
      const int head =
          item.kv_head * p.group + (by_row ? p.split(item.row0 + consumer() * kThetaRows + place).head : place);
      shared.theta[(consumer() * kThetaRows + place) * Memory::kThetaStride + pair] =
          angle_of_theta(number_of(bits_at(p.theta, p.narrow_theta, head * (D / 2) + pair), p.narrow_theta));
    }
    hopper::sync_threads(kTheta + consumer(), hopper::kWarpgroup);
  }

  // Of one row this thread has columns 8 w + 2 (lane % 4) and the next, for all w: both elements of every plane, of
  // either pairing.
  __device__ static void turn_plane(float& a, float& b, float cos, float sin) {
    const float turned = fmaf(a, cos, -(b * sin));
    b = fmaf(a, sin, b * cos);
    a = turned;
  }
  __device__ static void turn(float (&x)[D / 4], bool interleaved, const Angle<float>* angles) {
    if (interleaved) {
#pragma unroll
      for (int w = 0; w < D / 8; ++w) {
        const float2 angle = *reinterpret_cast<const float2*>(angles + 4 * w + lane_id() % 4);
        turn_plane(x[2 * w], x[2 * w + 1], angle.x, angle.y);
      }
    } else {
#pragma unroll
      for (int w = 0; w < D / 16; ++w) {
        const float4 two = *reinterpret_cast<const float4*>(angles + 8 * w + lane_id() % 4 * 2);
        turn_plane(x[2 * w], x[2 * w + D / 8], two.x, two.y);
        turn_plane(x[2 * w + 1], x[2 * w + 1 + D / 8], two.z, two.w);
      }
    }
  }

  // Where word w of a query row of this thread is before it is turned. With two streams there is room for the words of
  // each load to stay together, so that nothing has to wait for them and move them on.
  __device__ uint32_t& word_of_row(int i, int w) { return Streams == 2 ? q[w / 4][w % 4] : q[w / 2][i + w % 2 * 2]; }

  // Queries go to the register operand in two steps, since what lies in shared memory is long in coming while products
  // read from there: as they are, of item number n, ...
  __device__ void fetch_queries(unsigned n) {
    hopper::wait(&shared.q_full[n % kQuerySets], n / kQuerySets % 2);
    const T* from = shared.q[n % kQuerySets];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int block = 0; block < D / 32; ++block) {
        const int row = row0() - lane_id() / 4 + 8 * i + lane_id() % 8, packet = block * 4 + lane_id() / 8;
        uint32_t words[4];
        load_matrices(words, reinterpret_cast<const unsigned char*>(from) + packet / 8 * Memory::kRows * 128 +
                                 hopper::swizzled(row, packet % 8));
#pragma unroll
        for (int j = 0; j < 4; ++j) word_of_row(i, block * 4 + j) = words[j];
      }
    }
  }
  // ... and as the tile of this step meets them.
  __device__ void turn_queries() {
    const bool turned = p.turns_queries && at_bank();
    const Angle<float>* bank_angles = shared.bank_angles[shared.item[(items - 1) % kItems].chunk_slot];
    uint32_t words[kOwn][D / 8];
#pragma unroll
    for (int i = 0; i < kOwn * D / 8; ++i) words[i % kOwn][i / kOwn] = word_of_row(i % kOwn, i / kOwn);
    constexpr int kFours = kOwn == 1 && D == 64 ? 1 : kOwn * D / 128;
    uint32_t one_of_each[kFours][4];  // load
#pragma unroll
    for (int i = 0; i < 4 * kFours; ++i) one_of_each[i / 4][i % 4] = words[i % kOwn][i / kOwn * 4 % (D / 8)];
    await_loads(one_of_each);
    release(&shared.q_empty[(items - 1) % kQuerySets], !p.turns_queries || step > 0 || tiles == window_tiles);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float x[D / 4];
#pragma unroll
      for (int w = 0; w < D / 8; ++w) {
        const uint32_t word = words[i][w];
        q[w / 2][i + w % 2 * 2] = word;
        const float2 y = unpack<T>(word);
        x[2 * w] = y.x;
        x[2 * w + 1] = y.y;
      }
      if (turned) {
        turn(x, p.rope_interleaved, bank_angles);
#pragma unroll
        for (int w = 0; w < D / 8; ++w) q[w / 2][i + w % 2 * 2] = pack<T>(x[2 * w], x[2 * w + 1]);
      }
      if (Streams == 2) {
        turn(x, p.theta_interleaved, theta);
#pragma unroll
        for (int w = 0; w < D / 8; ++w) q[w / 2][1 + w % 2 * 2] = pack<T>(x[2 * w], x[2 * w + 1]);
      }
    }
  }

  __device__ void start_logits(float (&s)[kKeys / 2], Position at) {
    wait_tile(&shared.k_full[at.stage()], at.parity());
    const auto k = hopper::rows_descriptor(shared.k[at.stage()]);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      hopper::multiply<T, 0>(s, q[block], k + (block / 4 * kKeys * 8 + block % 4 * 2), block > 0);
    }
    hopper::commit_products();
  }
  // Copies by lanes belong to the generic proxy, and products read through the asynchronous one.
  __device__ void wait_tile(uint64_t* full, uint32_t parity) const {
    hopper::wait(full, parity);
    if (flags & Item::kCopied || at_bank()) hopper::fence_async_proxy();
  }

  // After the wait for them: adds the slots' bias, or takes away keys that a row does not see.
  __device__ void finish_logits(float (&s)[kKeys / 2], Position at) {
    hopper::pin(s);
    const int column = lane_id() % 4 * 2;
    if (at_bank()) {
      const float* bias = shared.bias[at.stage()] + column;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * i);
        s[4 * i] += b.x;
        s[4 * i + 1] += b.y;
        s[4 * i + 2] += b.x;
        s[4 * i + 3] += b.y;
      }
    } else {
      int seen[kOwn];  // from this thread's first column on
#pragma unroll
      for (int i = 0; i < kOwn; ++i) seen[i] = visible[i] - tile() * kKeys - column;
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

  // Logits to weights relative to the peaks. A peak that grows by less than a factor of 2^8 in the weights stays as it is:
  // weights are floating-point numbers, and rescaling the output would cost more. After an item's first tile peaks seldom
  // grow, and that none does takes few steps to find: the bits of positive numbers compare as the numbers do, and 0 stands
  // for all others. With one stream there are no registers for both ways.
  static constexpr bool kAsksFirst = Streams == 2;
  __device__ void absorb(float (&s)[kKeys / 2]) {
    bool grows = true;
    if (kAsksFirst && step > 0) {
      int top[2][2] = {};
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          int& x = top[row][i % 2];
          x = __vimax3_s32(x, __float_as_int(s[4 * i + 2 * row]), __float_as_int(s[4 * i + 2 * row + 1]));
        }
      }
      bool mine = false;
#pragma unroll
      for (int row = 0; row < 2; ++row) mine |= above_peak(__int_as_float(max(top[row][0], top[row][1])), row);
      grows = __any_sync(kAllLanes, mine);
    }
    if (grows) raise_peaks(s);
    float base[2], sum[2][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) base[row] = peak[row] == neg_inf<float>() ? 0.0f : peak[row] * p.log2_scale;
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
    for (int row = 0; row < 2; ++row) rows.total[row] += sum[row][0] + sum[row][1];
  }
  __device__ bool above_peak(float x, int row) const { return (x - peak[row]) * p.log2_scale > 8.0f; }

  // To those of these logits where they are above, with what has been summed so far.
  __device__ void raise_peaks(const float (&s)[kKeys / 2]) {
    float top[2][2];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float x = fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]);
        top[row][i % 2] = i < 2 ? x : fmaxf(top[row][i % 2], x);
      }
    }
    float shrink[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float x = fmaxf(top[row][0], top[row][1]);
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
      const bool grows = above_peak(x, row);
      shrink[row] = grows ? exp2_approximate((peak[row] - x) * p.log2_scale) : 1.0f;
      if (grows) peak[row] = x;
      rows.total[row] *= shrink[row];
    }
    if (step == 0 || __all_sync(kAllLanes, shrink[0] == 1.0f && shrink[1] == 1.0f)) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= shrink[i % 4 / 2];
  }

  __device__ void start_output(Position at, const uint32_t (&weights)[kKeys / 16][4], bool add) {
    wait_tile(&shared.v_full[at.stage()], at.parity());
    const auto v = hopper::columns_descriptor(shared.v[at.stage()], kKeys * 128);
    hopper::begin_products();
#pragma unroll
    for (int block = 0; block < kKeys / 16; ++block) {
      hopper::multiply<T, 1>(o, weights[block], v + block * (2048 >> 4), add || block > 0);
    }
    hopper::commit_products();
  }

  __device__ void run() {
    if (Streams == 2 && p.heads <= Memory::kRows) write_thetas();
    fetch_queries(0);
    if (!take_item()) return;
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    Rows ended;  // whose output is in o
#pragma unroll
    for (int i = 0; i < kOwn; ++i) ended.line[i] = kNoLine;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
    Position before{2}, now = next_position();
    turn_queries();
    hopper::pin(o);
    start_logits(s, now);
    while (true) {
      hopper::wait_products<0>();
      hopper::pin(o);
      release(&shared.v_empty[before.stage()], !before.keep());
      const bool last = step + 1 == tiles, other_queries = last || queries_change();
      if (other_queries) fetch_queries(last ? items : items - 1);
      finish_logits(s, now);
      absorb(s);
      pack_operand<T>(weights, s);
      const bool begun = step > 0;
      if (!begun) finish(ended);
      start_output(now, weights, begun);
      before = now;
      // The next logits come in the same wait.
      ++step;
      if (last) {
        wait_for_stream();  // before any output is written: what was there may still be read
        invert_totals();
        ended = rows;
        if (!take_item()) break;
      }
      if (other_queries) turn_queries();
      now = next_position();
      start_logits(s, now);
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
    for (int i = 0; i < 2; ++i) sum[i] = rows.total[i] + __shfl_xor_sync(kAllLanes, rows.total[i], 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) rows.total[i] = sum[i] > 0.0f ? __fdividef(1.0f, sum[i]) : 0.0f;
    if (p.lse && lane_id() % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t line = rows.line[i * (kOwn - 1)];
        if (line == kNoLine) continue;
        const float lse = sum[i] > 0.0f ? peak[i] * p.logit_scale + logf(sum[i]) : neg_inf<float>();
        static_cast<float*>(p.lse)[(Streams == 2 ? i * p.tokens * p.heads : 0) + line] = lse;
      }
    }
    if (Streams == 2) rows.ratio = number_of(rows.lam, p.narrow_lam) * rows.total[1] * sum[0];
  }

  // y = scale (o1 - ratio o2) of what the products gave, where scale is the first stream's inverse total and, under the
  // norm, 1 / rms.
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

constexpr int kThreads = hopper::kWarpgroup * (1 + kConsumers);

template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, D, Streams>*>(memory);
  if (!p.inputs_ready) wait_for_stream();  // of what follows, bank tiles and outputs wait by themselves
  const int warpgroup = threadIdx.x / hopper::kWarpgroup;
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * hopper::kWarpgroup / kWarp, kArrivals = Bring<T, D, Streams>::kArrivals;
    for (int set = 0; set < kQuerySets; ++set) {
      hopper::init_barrier(&shared.q_full[set], kArrivals);
      hopper::init_barrier(&shared.q_empty[set], kWarps);
    }
    for (int stage = 0; stage < stages(D); ++stage) {
      hopper::init_barrier(&shared.k_full[stage], kArrivals);
      hopper::init_barrier(&shared.v_full[stage], kArrivals);
      hopper::init_barrier(&shared.k_empty[stage], kWarps);
      hopper::init_barrier(&shared.v_empty[stage], kWarps);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    hopper::lower_registers<bring_registers(D, Streams)>();
    Bring<T, D, Streams>(p, shared, warp_id()).run();
  } else {
    hopper::raise_registers<attend_registers(D, Streams)>();
    Attend<T, D, Streams>(p, shared).run();
  }
  wait_for_stream();  // also where there was nothing to do: see launch_early
}

template <class T, int D, int Streams>
cudaError_t launch_forward(const BoundedAttentionForward& params, DType dtype, cudaStream_t stream) {
  Arguments p{};
  static_cast<BoundedAttentionForward&>(p) = params;
  p.row_tiles = static_cast<unsigned>(tiles_per_chunk(p, item_rows(Streams)));
  int multiprocessors = 0;
  auto status = multiprocessor_count(multiprocessors);
  if (status != cudaSuccess) return status;
  const auto units = static_cast<unsigned>(p.chunk_rows * p.kv_heads);
  p.whole = units - std::min<unsigned>(units, multiprocessors);
  p.shares = p.whole + (units - p.whole) * p.row_tiles;
  const dim3 grid(std::min<unsigned>(p.shares, multiprocessors));
  p.group = p.heads / p.kv_heads;
  p.group_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / p.group + 1);
  p.by_chunk = Divisor(p.chunk);
  p.by_window = Divisor(p.window);
  p.summary_rows = p.chunk_rows * p.kv_heads * p.summary_slots;
  const bool turns = p.has_bank_distance && p.exact_slots + p.summary_slots > 0;
  p.turns_keys = turns && may_turn_keys(D, Streams) && p.theta_interleaved == p.rope_interleaved;
  p.turns_queries = turns && !p.turns_keys;
  p.inputs_ready = p.prepared || p.summary_slots > 0;
  p.logit_scale = static_cast<float>(p.scale);
  p.log2_scale = static_cast<float>(p.scale * 1.4426950408889634);
  p.inverse_scale = static_cast<float>(1.0 / p.scale);
  p.eps = static_cast<float>(p.norm_eps);
  const auto map = [&](CUtensorMap& to, const void* base) {
    const Strides strides{0, static_cast<int64_t>(p.kv_heads) * D, D};
    return make_tensor_map(to, base, dtype, head_tile(D, p.kv_heads, p.tokens, 1, strides, kKeys));
  };
  p.boxed_queries = item_rows(Streams) % p.group == 0;
  status = map(p.k_map, p.k);
  if (status == cudaSuccess && p.boxed_queries) {
    const int64_t token = static_cast<int64_t>(p.heads) * D;
    status =
        make_tensor_map(p.q_map, p.q, dtype,
                        {4,
                         {D, static_cast<uint64_t>(p.heads), static_cast<uint64_t>(p.tokens), 1},
                         {D, token, token * p.tokens},
                         {64, static_cast<uint32_t>(p.group), static_cast<uint32_t>(item_rows(Streams) / p.group), 1}});
  }
  if (status == cudaSuccess) status = map(p.v_map, p.v);
  if (status == cudaSuccess && !p.prepared) status = cudaMemsetAsync(p.claims, 0, sizeof *p.claims, stream);
  if (status != cudaSuccess) return status;
  return launch_early(forward_kernel<T, D, Streams>, grid, kThreads, sizeof(Shared<T, D, Streams>), stream, p);
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
