#pragma once

#include "items.cuh"

namespace coda::kernels::sm90::bounded {

// The angle of a phase in radians. No branch for large ones, whose reduction in float64 is exact enough for a float.
__device__ inline Angle<float> angle_of_phase(double phase) {
  const double half_turns = phase * 0.31830988618379067;
  Angle<float> angle;
  sincospif(static_cast<float>(half_turns - 2.0 * rint(0.5 * half_turns)), &angle.sin, &angle.cos);
  return angle;
}
__device__ inline Angle<float> angle_of_theta(float theta) {
  Angle<float> angle;
  sincospif(theta * 0.318309886f, &angle.sin, &angle.cos);
  return angle;
}

// One warpgroup that brings queries: turned towards the bank, and as they stand, each in both streams. A thread has two packets of a
// row that are half a row apart, and so both elements of every plane, of either pairing.
template <class T, int D, int Streams>
struct BringQueries {
  using Memory = Shared<T, D, Streams>;
  static constexpr int kParts = D / 16;  // threads of a row
  static constexpr int kRowsAtOnce = hopper::kWarpgroup / kParts;
  static constexpr int kRowsOfThread = 2;  // at once
  static constexpr int kSteps = item_rows(Streams) / (kRowsOfThread * kRowsAtOnce);
  enum NamedBarrier { kAngles = 3 };

  const Arguments& p;
  Memory& shared;
  const int thread, part;
  Place& item;
  hopper::RingPosition<kQuerySets> at;
  double frequency = 0.0;  // of the pair whose angle this thread works out
  int theta_head = -1;
  Angle<float> theta[8];  // of theta_head
  int angles_of = -1;     // the chunk row whose bank angles are in shared memory

  __device__ BringQueries(const Arguments& arguments, Memory& memory)
      : p(arguments), shared(memory), thread(threadIdx.x % hopper::kWarpgroup), part(thread % kParts),
        item(memory.place[warp_id()]) {
    if (p.turned && thread < D / 2) frequency = p.inv_freq[thread];
  }

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
    if (interleaved) {
#pragma unroll
      for (int i = 0; i < 8; ++i) turn_plane(x[2 * i], x[2 * i + 1], angle(i));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) turn_plane(x[i], x[8 + i], angle(i));
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
    if (angles_of == item.snapshot) return;
    angles_of = item.snapshot;
    hopper::sync_threads(kAngles, hopper::kWarpgroup);
    if (thread < D / 2) {
      const int64_t start = p.tokens_seen[item.sequence] + item.chunk_start;
      shared.bank_angles[thread] = angle_of_phase(mul_rn(static_cast<double>(p.bank_distance - start), frequency));
    }
    hopper::sync_threads(kAngles, hopper::kWarpgroup);
  }

  // Fills the next set of queries; the first of an item also tells what the item is.
  __device__ void bring(bool first, bool bank) {
    const int set = at.stage;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      // What the first step reads has arrived when the wait is over.
      uint4 words[kRowsOfThread][2];
      const int half = step * kRowsOfThread * kRowsAtOnce / kRows;
      int row[kRowsOfThread], head[kRowsOfThread];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int in_item = (step * kRowsOfThread + i) * kRowsAtOnce + thread / kParts, r = item.row0 + in_item;
        row[i] = in_item % kRows;
        const auto at_row = p.split(r);
        head[i] = item.kv_head * p.group + at_row.head;
        const int64_t line = item.line0 + static_cast<uint32_t>(at_row.token * p.heads + at_row.head);
        const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + line * D) + part;
        const bool real = r < item.rows;
        words[i][0] = real ? __ldg(from) : uint4{0, 0, 0, 0};
        words[i][1] = real ? __ldg(from + kParts) : uint4{0, 0, 0, 0};
      }
      if (step == 0) {
        hopper::wait(&shared.q_empty[set], at.parity ^ 1);
        if (first && thread == 0) shared.item[set] = item;
      }
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        float x[16];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t w[4] = {words[i][j].x, words[i][j].y, words[i][j].z, words[i][j].w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 y = unpack<T>(w[e]);
            x[8 * j + 2 * e] = y.x;
            x[8 * j + 2 * e + 1] = y.y;
          }
        }
        if (bank) {
          turn(x, p.rope_interleaved, [&](int e) { return shared.bank_angles[pair_of(e, p.rope_interleaved)]; });
          store(shared.q[set][half], row[i], x);
        } else {
          store(shared.q[set][half], row[i], 0, words[i][0]);
          store(shared.q[set][half], row[i], 1, words[i][1]);
        }
        if (Streams == 1) continue;
        if (head[i] != theta_head) {
          theta_head = head[i];
          const auto* angles = static_cast<const float*>(p.theta) + head[i] * (D / 2);
#pragma unroll
          for (int e = 0; e < 8; ++e) theta[e] = angle_of_theta(__ldg(angles + pair_of(e, p.theta_interleaved)));
        }
        turn(x, p.theta_interleaved, [&](int e) { return theta[e]; });
        store(shared.q[set][1], row[i], x);
      }
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
