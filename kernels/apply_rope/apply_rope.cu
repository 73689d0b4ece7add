#include "apply_rope.h"

#include "../common/launch.cuh"
#include "../common/rotation.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 128;

template <class A>
__device__ inline Angle<A> token_angle(const ApplyRopeParams& p, int64_t row, int i) {
  return rope_angle<A>(p.inverse ? -p.positions[row] : p.positions[row], p.inv_freq[i]);
}

// A thread takes one pair of one token through all heads, so that each angle is computed once.
template <class T>
__global__ void apply_rope_kernel(ApplyRopeParams p) {
  using A = acc_t<T>;
  const int half = p.dim / 2;
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= p.rows * half) return;
  const int64_t row = index / half;
  const int i = static_cast<int>(index % half);
  const Angle<A> turn = token_angle<A>(p, row, i);
  const int first = first_of_pair(i, p.interleaved), second = second_of_pair(i, p.dim, p.interleaved);
  for (int h = 0; h < p.heads; ++h) {
    const T* from = static_cast<const T*>(p.x) + row * p.row_stride + h * p.head_stride;
    T* to = static_cast<T*>(p.out) + (row * p.heads + h) * p.dim;
    A a = widen(from[first]), b = widen(from[second]);
    turn_pair(a, b, turn);
    to[first] = narrow<T>(a * static_cast<A>(p.scaling));
    to[second] = narrow<T>(b * static_cast<A>(p.scaling));
  }
}

template <class T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// What nothing reads again makes room for what is written.
template <class T>
__device__ inline Packet<T> load_once(const T* from) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
  return *reinterpret_cast<const Packet<T>*>(&words);
}

constexpr int kAtOnce = 2;  // items of a thread that are underway together

// As many as give each thread so many items and not more than one angle.
template <class T>
__host__ __device__ int block_rows(const ApplyRopeParams& p) {
  const int by_items = kAtOnce * kThreads / (p.heads * (p.dim / 2 / Packet<T>::kSize)), by_angles = kThreads / (p.dim / 2);
  const int rows = by_items < by_angles ? by_items : by_angles;
  return rows > 1 ? rows : 1;
}
template <class T>
size_t angle_bytes(const ApplyRopeParams& p) {
  return 2 * sizeof(acc_t<T>) * block_rows<T>(p) * (p.dim / 2);
}

// The same in pieces of 16 bytes: an item is a packet of pairs of one token and head, which lie in two packets of its row. A
// block takes some tokens, whose angles it computes while the first items come.
template <class T>
__global__ void __launch_bounds__(kThreads, 8) apply_rope_packets_kernel(ApplyRopeParams p) {
  using A = acc_t<T>;
  constexpr int kSize = Packet<T>::kSize;
  extern __shared__ __align__(16) unsigned char shared[];
  const int half = p.dim / 2, per_head = half / kSize, per_token = p.heads * per_head;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * block_rows<T>(p);
  const int rows = static_cast<int>(min(static_cast<int64_t>(block_rows<T>(p)), p.rows - first_row));
  A* const cosines = reinterpret_cast<A*>(shared);  // (rows, D/2)
  A* const sines = cosines + rows * half;
  const T* const x = static_cast<const T*>(p.x) + first_row * p.row_stride;
  T* const out = static_cast<T*>(p.out) + first_row * p.heads * p.dim;
  const int second = p.interleaved ? kSize : half;  // packet of an item, from its first one
  const int items = rows * per_token;
  for (int start = threadIdx.x; start - static_cast<int>(threadIdx.x) < items; start += kAtOnce * kThreads) {
    Packet<T> packet[kAtOnce][2];
    int row[kAtOnce], head[kAtOnce], pair[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int item = start + n * kThreads;
      row[n] = item / per_token;
      head[n] = item % per_token / per_head;
      pair[n] = item % per_head * kSize;
      if (item >= items) continue;
      const T* from = x + row[n] * p.row_stride + head[n] * p.head_stride + (p.interleaved ? 2 * pair[n] : pair[n]);
      packet[n][0] = load_once(from);
      packet[n][1] = load_once(from + second);
    }
    if (start == static_cast<int>(threadIdx.x)) {
      for (int i = threadIdx.x; i < rows * half; i += kThreads) {
        const Angle<A> turn = token_angle<A>(p, first_row + i / half, i % half);
        cosines[i] = turn.cos;
        sines[i] = turn.sin;
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (start + n * kThreads >= items) continue;
      const int at = row[n] * half + pair[n];
      const auto turn = [&](T& first, T& second, int i) {
        A a = widen(first), b = widen(second);
        turn_pair(a, b, Angle<A>{cosines[at + i], sines[at + i]});
        first = narrow<T>(a * static_cast<A>(p.scaling));
        second = narrow<T>(b * static_cast<A>(p.scaling));
      };
      if (p.interleaved) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          T* pair_of = packet[n][2 * i / kSize].x + 2 * i % kSize;
          turn(pair_of[0], pair_of[1], i);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) turn(packet[n][0].x[i], packet[n][1].x[i], i);
      }
      T* to = out + (row[n] * p.heads + head[n]) * static_cast<int64_t>(p.dim) + (p.interleaved ? 2 * pair[n] : pair[n]);
      *reinterpret_cast<Packet<T>*>(to) = packet[n][0];
      *reinterpret_cast<Packet<T>*>(to + second) = packet[n][1];
    }
  }
}

// Whether every row begins, and every packet of pairs lies, at a multiple of 16 bytes.
template <class T>
bool in_packets(const ApplyRopeParams& p) {
  constexpr int kSize = Packet<T>::kSize;
  return p.dim > 0 && p.heads > 0 && p.dim / 2 % kSize == 0 && p.row_stride % kSize == 0 && p.head_stride % kSize == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
         angle_bytes<T>(p) <= 48 * 1024;
}

dim3 blocks_of(int64_t count, int64_t each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); }

}  // namespace

cudaError_t apply_rope(const ApplyRopeParams& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (in_packets<T>(params)) {
      return launch(apply_rope_packets_kernel<T>, blocks_of(params.rows, block_rows<T>(params)), kThreads,
                    angle_bytes<T>(params), stream, params);
    }
    return launch(apply_rope_kernel<T>, blocks_of(params.rows * (params.dim / 2), kThreads), kThreads, 0, stream, params);
  });
}

}  // namespace coda::kernels
