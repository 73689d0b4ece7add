#include "../../common/launch.cuh"
#include "../../common/rotation.cuh"
#include "../../common/sequences.cuh"
#include "backward.h"
#include "tiles.cuh"

namespace coda::kernels::sm90 {
namespace {

// A tile's sequence.
struct QueryTile {
  int64_t sequence, begin;  // first query of the tile, within the sequence
  int64_t query0, queries;  // first query of the sequence over all sequences

  __device__ QueryTile(const BackwardArguments& p, int64_t tile) {
    if (p.cu_seqlens_q) {
      const Tile where = find_tile(p.sequences, tile, kQueryTile, [&](int64_t n) { return p.cu_seqlens_q[n]; });
      sequence = where.sequence;
      begin = where.begin;
      query0 = p.cu_seqlens_q[sequence];
      queries = p.cu_seqlens_q[sequence + 1] - query0;
    } else {
      const int64_t tiles = p.tiles / p.sequences;
      sequence = tile / tiles;
      begin = tile % tiles * kQueryTile;
      query0 = sequence * p.length_q;
      queries = p.length_q;
    }
  }
};

// One tile of one head: R_theta q, numbers, zeroed sums; in packed batches q and grad_diff cut into tiles.
template <class T, int D>
__global__ void __launch_bounds__(128) queries_before_kernel(const __grid_constant__ BackwardArguments p) {
  const int64_t tile = blockIdx.x;
  const int head = blockIdx.y, thread = threadIdx.x;
  const bool two = p.streams == 2;
  __shared__ Angle<float> angles[D / 2];
  if (two) {
    if (thread < D / 2) angles[thread] = angle_of(static_cast<const float*>(p.theta)[head * (D / 2) + thread]);
    __syncthreads();
    if (tile == 0 && thread < D / 2) {
      const int pair = panel_pair(D, p.theta_interleaved, thread / 32, thread / 8 % 4, thread / 2 % 4, thread % 2);
      reinterpret_cast<Angle<float>*>(p.angles)[head * (D / 2) + thread] = angles[pair];
    }
  }
  const QueryTile where(p, tile);
  const int64_t left = where.queries - where.begin;
  if (left <= 0) return;
  const int count = static_cast<int>(left < kQueryTile ? left : kQueryTile);
  const int64_t query = where.query0 + where.begin;

  auto* sums = reinterpret_cast<float4*>(p.grad_q_sums) + (head * p.tiles + tile) * (kQueryTile * D / 4);
  for (int i = thread; i < kQueryTile * D / 4; i += blockDim.x) sums[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};

  if (thread < kQueryTile) {
    const int64_t at = (query + thread) * p.heads + head, rows = p.queries * p.heads;
    auto* tile_numbers = p.numbers + (head * p.tiles + tile) * (query_numbers(p.streams) * kQueryTile);
    auto* numbers = tile_numbers + number_slot(thread);
    const auto* lse = static_cast<const float*>(p.lse) + at;
    const auto* delta = static_cast<const float*>(p.delta) + at;
    // Logits of -inf: no weights where there is no query, or it sees no key.
    const bool sees = thread < count && lse[0] != neg_inf<float>();
    const float inverse_scale = static_cast<float>(1.0 / p.scale);
    numbers[kShift1 * kQueryTile] = sees ? -lse[0] * inverse_scale : neg_inf<float>();
    numbers[kNegativeDelta1 * kQueryTile] = sees ? -delta[0] : 0.0f;
    if (two) {
      const float lam = sees ? static_cast<const float*>(p.lam)[at] : 0.0f;
      numbers[kShift2 * kQueryTile] = sees ? (logf(fabsf(lam)) - lse[rows]) * inverse_scale : neg_inf<float>();
      numbers[kDeltaChange * kQueryTile] = sees ? delta[0] - delta[rows] : 0.0f;
      const uint32_t sign = lam < 0.0f ? 0u : 0x8000u, next = __shfl_down_sync(kAllLanes, sign, 1);
      if (thread % 2 == 0) {
        reinterpret_cast<uint32_t*>(tile_numbers + kSigns * kQueryTile)[sign_slot(thread)] = next << 16 | sign;
      }
    }
  }

  const bool packed = p.cu_seqlens_q != nullptr;
  if (!packed && !two) return;
  const auto* q = static_cast<const T*>(p.q) + (packed ? where.query0 : 0) * p.q_strides.token +
                  where.sequence * p.q_strides.sequence + where.begin * p.q_strides.token + head * p.q_strides.head;
  const auto* grad = static_cast<const T*>(p.grad_diff) + (query * p.heads + head) * D;
  const int64_t to = ((packed ? tile * kQueryTile : query) * p.heads + head) * D;
  for (int i = thread; i < (packed ? kQueryTile : count) * (D / 16); i += blockDim.x) {
    const int c = i / (D / 16), first = i % (D / 16) * kPacket, second = D / 2 + first;
    const int64_t line = to + static_cast<int64_t>(c) * p.heads * D;
    float x[kPacket] = {}, y[kPacket] = {};
    if (c < count) {
      load_packet(x, q + c * p.q_strides.token + first);
      load_packet(y, q + c * p.q_strides.token + second);
    }
    if (packed) {
      store_packet(static_cast<T*>(p.tiled_q) + line + first, x);
      store_packet(static_cast<T*>(p.tiled_q) + line + second, y);
      auto* tiled = static_cast<T*>(p.tiled_grad) + line;
      const auto* from = grad + static_cast<int64_t>(c) * p.heads * D;
      const uint4 zero{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(tiled + first) = c < count ? *reinterpret_cast<const uint4*>(from + first) : zero;
      *reinterpret_cast<uint4*>(tiled + second) = c < count ? *reinterpret_cast<const uint4*>(from + second) : zero;
    }
    if (!two) continue;
    if (p.theta_interleaved) {
#pragma unroll
      for (int e = 0; e < kPacket; e += 2) {
        turn_pair(x[e], x[e + 1], angles[(first + e) / 2]);
        turn_pair(y[e], y[e + 1], angles[(second + e) / 2]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kPacket; ++e) turn_pair(x[e], y[e], angles[first + e]);
    }
    store_packet(static_cast<T*>(p.turned_q) + line + first, x);
    store_packet(static_cast<T*>(p.turned_q) + line + second, y);
  }
}

// The sums, scaled, to the storage type and order.
template <class T, int D>
__global__ void __launch_bounds__(2 * D) queries_after_kernel(const __grid_constant__ BackwardArguments p) {
  const int64_t tile = blockIdx.x;
  const int head = blockIdx.y, panel = threadIdx.x / 128, thread = threadIdx.x % 128, quad = thread % 4;
  const QueryTile where(p, tile);
  if (where.begin >= where.queries) return;
  const auto* sums = reinterpret_cast<const float4*>(p.grad_q_sums) +
                     ((head * p.tiles + tile) * (D / 64) + panel) * (kQueryTile * 64 / 4) + thread;
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t rows[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 x = sums[(4 * half + j) * 128];
      rows[0][j] = pack<T>(x.x * scale, x.y * scale);
      rows[1][j] = pack<T>(x.z * scale, x.w * scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      transpose_quad(rows[r]);
      const int64_t query = where.begin + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
      if (query >= where.queries) continue;
      auto* line = static_cast<T*>(p.grad_q) + ((where.query0 + query) * p.heads + head) * D;
      *reinterpret_cast<uint4*>(line + panel_column(D, panel, 4 * half + quad, 0)) =
          uint4{rows[r][0], rows[r][1], rows[r][2], rows[r][3]};
    }
  }
}

// f(T{}, std::integral_constant of D)
template <class F>
cudaError_t dispatch_storage(DType dtype, int dim, F f) {
  const auto with_dim = [&](auto zero) {
    return dim == 64 ? f(zero, std::integral_constant<int, 64>{}) : f(zero, std::integral_constant<int, 128>{});
  };
  return dtype == DType::kBFloat16 ? with_dim(__nv_bfloat16{}) : with_dim(__half{});
}

dim3 tile_grid(const BackwardArguments& p) { return {static_cast<unsigned>(p.tiles), static_cast<unsigned>(p.heads)}; }

}  // namespace

cudaError_t queries_before(const BackwardArguments& p, DType dtype, cudaStream_t stream) {
  return dispatch_storage(dtype, p.dim, [&](auto zero, auto dim) {
    return launch(queries_before_kernel<decltype(zero), dim()>, tile_grid(p), 128, 0, stream, p);
  });
}

cudaError_t queries_after(const BackwardArguments& p, DType dtype, cudaStream_t stream) {
  return dispatch_storage(dtype, p.dim, [&](auto zero, auto dim) {
    return launch(queries_after_kernel<decltype(zero), dim()>, tile_grid(p), 2 * dim(), 0, stream, p);
  });
}

}  // namespace coda::kernels::sm90
