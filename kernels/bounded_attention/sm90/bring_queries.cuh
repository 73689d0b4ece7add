#pragma once

#include "items.cuh"

namespace coda::kernels::sm90::bounded {

// The angle of a phase in radians, in float64 reduced to [-pi, pi], where the approximate sine and cosine are good to 2^-20: far below
// what rounding a query costs.
__device__ inline Angle<float> angle_of_phase(double phase) {
  const double turns = phase * 0.15915494309189535;
  const float x = static_cast<float>((turns - rint(turns)) * 6.283185307179586);
  return {__cosf(x), __sinf(x)};
}
__device__ inline Angle<float> angle_of_theta(float theta) {
  const float turns = rintf(theta * 0.15915494f);
  const float x = fmaf(turns, 1.7484555e-7f, fmaf(turns, -6.2831855f, theta));
  return {__cosf(x), __sinf(x)};
}

// One warpgroup that brings queries: turned towards the bank, and as they stand, each in both streams. A thread has two packets of a
// row that are half a row apart, and so both elements of every plane, of either pairing.
template <class T, int D, int Streams>
struct BringQueries {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kParts = D / 16;  // threads of a row
  static constexpr int kRowsAtOnce = hopper::kWarpgroup / kParts;
  static constexpr int kSteps = item_rows(Streams) / kRowsAtOnce;
  static constexpr int kAhead = Streams == 1 ? 2 : 1;  // rows on their way

  const Arguments& p;
  Memory& shared;
  const int thread, part;
  Place& item;
  hopper::RingPosition<kQuerySets> at;
  int theta_head = -1;
  Angle<float> theta[8];  // of theta_head

  __device__ BringQueries(const Arguments& arguments, Memory& memory)
      : p(arguments), shared(memory), thread(threadIdx.x % hopper::kWarpgroup), part(thread % kParts),
        item(memory.place[warp_id()]) {}

  // The pair of this thread's i-th plane.
  __device__ int pair_of(int i, bool interleaved) const {
    return interleaved ? 4 * part + i % 4 + i / 4 * (D / 4) : 8 * part + i;
  }
  __device__ static void turn_plane(float& a, float& b, Angle<float> by) {
    const float turned = fmaf(a, by.cos, -(b * by.sin));
    b = fmaf(a, by.sin, b * by.cos);
    a = turned;
  }
  template <class AngleOf>
  __device__ static void turn(float (&x)[16], bool interleaved, AngleOf angle) {
    // Four planes at a time: the compiler may not gather more angles from memory before it uses them.
    if (interleaved) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i == 4) asm volatile("" ::: "memory");
        turn_plane(x[2 * i], x[2 * i + 1], angle(i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i == 4) asm volatile("" ::: "memory");
        turn_plane(x[i], x[8 + i], angle(i));
      }
    }
  }

  __device__ void store(T* to, int row, int half, uint4 words) const {
    const int packet = part + half * kParts;
    auto* panel = reinterpret_cast<unsigned char*>(to) + packet / 8 * kRows * 128;
    *reinterpret_cast<uint4*>(panel + hopper::swizzled(row, packet % 8)) = words;
  }
  __device__ void store(T* to, int row, const float (&x)[16]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* y = x + 8 * half;
      store(to, row, half, uint4{pack<T>(y[0], y[1]), pack<T>(y[2], y[3]), pack<T>(y[4], y[5]), pack<T>(y[6], y[7])});
    }
  }

  __device__ void write_bank_angles() {
    hopper::sync_threads(kAngles, hopper::kWarpgroup);
    if (thread < D / 2) {
      const int64_t start = p.tokens_seen[item.sequence] + item.chunk_start;
      shared.bank_angles[thread] = angle_of_phase(mul_rn(static_cast<double>(p.bank_distance - start), __ldg(p.inv_freq + thread)));
    }
    hopper::sync_threads(kAngles, hopper::kWarpgroup);
  }

  struct Words {
    uint4 half[2];
  };
  // This thread's share of its row number `step`, zeros past the end of the chunk.
  __device__ Words load(int step) const {
    const int r = item.row0 + step * kRowsAtOnce + thread / kParts;
    if (r >= item.rows) return {};
    const auto at = p.split(r);
    const int64_t line = item.line0 + static_cast<uint32_t>(at.token * p.heads + at.head);
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + line * D) + part;
    return {{__ldg(from), __ldg(from + kParts)}};
  }

  // Fills the next set of queries; the first of an item also tells what the item is. Loops stay loops: instructions have to be fetched
  // as well, for four warpgroups that all do something else.
  __device__ void bring(bool first, bool bank) {
    const int set = at.stage;
    Words next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next[i] = load(i);
    hopper::wait(&shared.q_empty[set], at.parity ^ 1);
    if (first && thread == 0) shared.item[set] = item;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const Words words = next[0];
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) next[i] = next[i + 1];
      if (step + kAhead < kSteps) next[kAhead - 1] = load(step + kAhead);
      const int in_item = step * kRowsAtOnce + thread / kParts, row = in_item % kRows, tile = in_item / kRows;
      float x[16];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t w[4] = {words.half[j].x, words.half[j].y, words.half[j].z, words.half[j].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 y = unpack<T>(w[e]);
          x[8 * j + 2 * e] = y.x;
          x[8 * j + 2 * e + 1] = y.y;
        }
      }
      if (bank) {
        turn(x, p.rope_interleaved, [&](int e) { return shared.bank_angles[pair_of(e, p.rope_interleaved)]; });
        store(shared.q[set][tile], row, x);
      } else {
        store(shared.q[set][tile], row, 0, words.half[0]);
        store(shared.q[set][tile], row, 1, words.half[1]);
      }
      if (Streams == 1) continue;
      const int head = item.kv_head * p.group + p.split(item.row0 + in_item).head;
      if (head != theta_head) {
        theta_head = head;
        const auto* angles = static_cast<const float*>(p.theta) + head * (D / 2);
#pragma unroll
        for (int e = 0; e < 8; ++e) theta[e] = angle_of_theta(__ldg(angles + pair_of(e, p.theta_interleaved)));
      }
      turn(x, p.theta_interleaved, [&](int e) { return theta[e]; });
      store(shared.q[set][1], row, x);
    }
    announce();
  }

  __device__ void announce() {
    hopper::fence_async_proxy();
    __syncwarp();
    if (lane_id() == 0) hopper::arrive(&shared.q_full[at.stage]);
    at.advance();
  }

  __device__ void run() {
    for_items(p, item, item_rows(Streams), [&] {
      if (p.turned) {
        write_bank_angles();
        bring(true, true);
      }
      bring(!p.turned, false);
    });
    hopper::wait(&shared.q_empty[at.stage], at.parity ^ 1);
    if (thread == 0) shared.item[at.stage].tiles = 0;
    announce();
  }
};

}  // namespace coda::kernels::sm90::bounded
