#pragma once

#include "../../common/launch.cuh"
#include "../../common/numeric.cuh"
#include "../summary.cuh"

// How a chunk's candidates move the summary slots that they were given. Half a warp has a slot, so one instruction serves two; a
// lane has four neighbouring elements of every 64.
namespace coda::kernels::sm90 {

__device__ inline int half_lane() { return lane_id() % (kWarp / 2); }

// Who went to this half warp's slot: bits of candidates c and c + 32.
struct alignas(8) Members {
  uint32_t of[2];
  __device__ bool any() const { return (of[0] | of[1]) != 0; }
};

__device__ inline float load_shared(uint32_t from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
  return x;
}
__device__ inline uint2 load_shared2(uint32_t from) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(from));
  return x;
}

// The sum of the members' rows, each times its gate, in order, and that of their gates. The halves of a warp take their members
// at the same time. Shared addresses: gates lie at `gates`, this lane's part of candidate c's row at from(c), in groups that are
// `stride` bytes apart.
template <class T, int kGroups, class From>
__device__ inline void weigh(float (&sum)[kGroups * 4], float& mass, const Members& members, uint32_t gates, uint32_t stride,
                             From from) {
  mass = 0.0f;
#pragma unroll
  for (float& x : sum) x = 0.0f;
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll 1
    for (uint32_t left = members.of[u]; left != 0; left &= left - 1) {
      const uint32_t c = u * kWarp + __ffs(left) - 1, row = from(c);
      const float weight = load_shared(gates + c * 4);
      float x[kGroups * 4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint2 words = load_shared2(row + group * stride);
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        x[group * 4] = low.x, x[group * 4 + 1] = low.y, x[group * 4 + 2] = high.x, x[group * 4 + 3] = high.y;
      }
      mass += weight;
#pragma unroll
      for (int e = 0; e < kGroups * 4; ++e) sum[e] += weight * x[e];
    }
  }
  __syncwarp();
}

// How far a slot moves towards the mean of its members, whose gates add up to `mass`. A free slot, which is 0, becomes the mean.
struct Move {
  float share, rate;  // one over the mass
  __device__ Move(float log_stay, bool used, float mass) : rate(used ? ema_rate(log_stay, mass) : 1.0f) {
    // Rounded as a division would be, of normal numbers.
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(mass));
    share = __fmaf_rn(__fmaf_rn(-mass, near, 1.0f), near, near);
  }
};

}  // namespace coda::kernels::sm90
