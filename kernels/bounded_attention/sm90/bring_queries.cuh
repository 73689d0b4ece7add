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
  static constexpr int kSteps = kRows / kRowsAtOnce;
  enum NamedBarrier { kAngles = 3 };

  const Arguments& p;
  Memory& shared;
  const int thread, part;
  hopper::RingPosition<kQuerySets> at;
  double frequency = 0.0;  // of the pair whose angle this thread works out
  int theta_head = -1;
  Angle<float> theta[8];  // of theta_head

  __device__ BringQueries(const Arguments& arguments, Memory& memory)
      : p(arguments), shared(memory), thread(threadIdx.x % hopper::kWarpgroup), part(thread % kParts) {
    if (p.turned && thread < D / 2) frequency = p.inv_freq[thread];
  }

  // The pair of this thread's i-th plane.
  __device__ int pair_of(int i, bool interleaved) const {
    return interleaved ? 4 * part + i % 4 + i / 4 * (D / 4) : 8 * part + i;
  }
  template <class AngleOf>
  __device__ static void turn(float (&x)[16], bool interleaved, AngleOf angle) {
    if (interleaved) {
#pragma unroll
      for (int i = 0; i < 8; ++i) turn_pair(x[2 * i], x[2 * i + 1], angle(i));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) turn_pair(x[i], x[8 + i], angle(i));
    }
  }

  __device__ void store(T* to, int row, const float (&x)[16]) const {
    auto* tile = reinterpret_cast<unsigned char*>(to);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packet = part + half * kParts;
      const float* y = x + 8 * half;
      *reinterpret_cast<uint4*>(tile + packet / 8 * kRows * 128 + hopper::swizzled(row, packet % 8)) =
          uint4{pack<T>(y[0], y[1]), pack<T>(y[2], y[3]), pack<T>(y[4], y[5]), pack<T>(y[6], y[7])};
    }
  }

  __device__ void write_bank_angles(const Item& item) {
    hopper::sync_threads(kAngles, hopper::kWarpgroup);
    if (thread < D / 2) {
      const int64_t start = p.tokens_seen[item.sequence] + item.chunk_start;
      shared.bank_angles[thread] = angle_of_phase(mul_rn(static_cast<double>(p.bank_distance - start), frequency));
    }
    hopper::sync_threads(kAngles, hopper::kWarpgroup);
  }

  // Fills the next set of queries; the first of an item also tells what the item is.
  __device__ void bring(const Item& item, bool first, bool bank) {
    const int set = at.stage;
#pragma unroll 1
    for (int half = 0; half < kConsumers / Streams; ++half) {
      // What is brought before the wait has arrived when it ends.
      uint4 words[kSteps][2];
      int row[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        row[i] = i * kRowsAtOnce + thread / kParts;
        const int r = item.row0 + half * kRows + row[i];
        const int64_t line = item.line0 + static_cast<uint32_t>(r / p.group * p.heads + r % p.group);
        const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + line * D) + part;
        const bool real = r < item.rows;
        words[i][0] = real ? __ldg(from) : uint4{0, 0, 0, 0};
        words[i][1] = real ? __ldg(from + kParts) : uint4{0, 0, 0, 0};
      }
      if (half == 0) {
        hopper::wait(&shared.q_empty[set], at.parity ^ 1);
        if (first && thread == 0) shared.item[set] = item;
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
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
        if (bank) turn(x, p.rope_interleaved, [&](int e) { return shared.bank_angles[pair_of(e, p.rope_interleaved)]; });
        store(shared.q[set][half], row[i], x);
        if (Streams == 1) continue;
        const int head = item.kv_head * p.group + (item.row0 + row[i]) % p.group;
        if (head != theta_head) {
          theta_head = head;
          const auto* angles = static_cast<const float*>(p.theta) + head * (D / 2);
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
    for_items(p, shared.brought[warp_id()], item_rows(Streams), [&](const Item& item) {
      if (p.turned) {
        write_bank_angles(item);
        bring(item, true, true);
      }
      bring(item, !p.turned, false);
    });
    hopper::wait(&shared.q_empty[at.stage], at.parity ^ 1);
    if (thread == 0) shared.item[at.stage].tiles = 0;
    announce();
  }
};

}  // namespace coda::kernels::sm90::bounded
