#pragma once

// What the tensor-core paths share: 16-bit elements two to a word, and 8x8 tiles of them between registers and shared memory.

#include <type_traits>

#include "numeric.cuh"

namespace coda::kernels {

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}

// On whole words: as a pair of 16-bit values the compiler would keep the halves in two registers.
template <class T>
__device__ inline float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  } else {
    float2 y;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(y.x), "=f"(y.y)
        : "r"(x));
    return y;
  }
}
template <class T>
__device__ inline uint32_t add_packed(uint32_t a, uint32_t b) {
  uint32_t sum;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  }
  return sum;
}

constexpr int kPacket = 8;  // elements of 16 bytes

template <class T>
__device__ inline void load_packet(float (&to)[kPacket], const T* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(w[i]);
    to[2 * i] = x.x;
    to[2 * i + 1] = x.y;
  }
}
template <class T>
__device__ inline void store_packet(T* to, const float (&from)[kPacket]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = pack<T>(from[2 * i], from[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = uint4{w[0], w[1], w[2], w[3]};
}

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 tiles of 16-bit elements; lane l brings the address of row l % 8 of tile l / 8. A lane gets, of each, row lane / 4,
// columns 2 (lane % 4) and the next; transposed, column lane / 4 and those rows.
__device__ inline void load_matrices_at(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices_transposed_at(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_at(r, shared_address(row)); }
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_transposed_at(r, shared_address(row));
}

// Holds the warp until words that load_matrices gave are there. Before it, what they are read from may not be given back to the copy
// engine: a load is over when its value is there, not when it has been issued.
template <int N>
__device__ inline void await_loads(const uint32_t (&words)[N][4]) {
  uint32_t all = ~0u;
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) all &= words[i / 4][i % 4];
  __syncwarp(__all_sync(kAllLanes, all == ~0u) ? __activemask() : kAllLanes);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
#endif

}  // namespace coda::kernels
