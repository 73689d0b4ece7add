#include "backward.cuh"

namespace coda::kernels::sm80 {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int kHeads = 8;  // heads turned at a time

// The 16 elements of eight planes of a row: where they begin, of planes 8 unit and following.
template <int D>
struct Planes {
  int64_t low, high;
  float a[kPacket], b[kPacket];

  __device__ Planes(int64_t row, int unit, bool interleaved)
      : low(row + (interleaved ? 16 : 8) * unit), high(low + (interleaved ? 8 : D / 2)) {}
  template <class T>
  __device__ void load(const void* from) {
    load_packet(a, static_cast<const T*>(from) + low);
    load_packet(b, static_cast<const T*>(from) + high);
  }
  // As `store` leaves them.
  template <class T>
  __device__ void round() {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      a[i] = widen(narrow<T>(a[i]));
      b[i] = widen(narrow<T>(b[i]));
    }
  }
  template <class T>
  __device__ void store(void* to) const {
    store_packet(static_cast<T*>(to) + low, a);
    store_packet(static_cast<T*>(to) + high, b);
  }
  __device__ void turn(const Angle<float>* by, bool interleaved) {
    if (interleaved) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        turn_pair(a[2 * i], a[2 * i + 1], by[i]);
        turn_pair(b[2 * i], b[2 * i + 1], by[4 + i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) turn_pair(a[i], b[i], by[i]);
    }
  }
};

// What every later kernel reads, for one snapshot and KV head: its slots, the sources that enter the exact bank with it, its
// queries turned, its rows' scalars.
template <class T, int D>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(BoundedBackward p) {
  constexpr int kPlanes = D / 2;
  __shared__ Angle<float> bank_angles[kPlanes], theta_angles[kHeads * kPlanes];
  __shared__ int used;
  const int kv_head = blockIdx.x % p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t row = blockIdx.x / p.kv_heads;
  if (row == 0 && p.streams == 2) {
    const int64_t from = static_cast<int64_t>(kv_head) * group * kPlanes;
    for (int i = threadIdx.x; i < group * kPlanes; i += kPrepareThreads) {
      p.theta_angles[from + i] = angle_of(static_cast<const float*>(p.theta)[from + i]);
    }
  }
  const HeadView view(p, sequence_of_row(p, row), kv_head);
  const int chunk = static_cast<int>(row - view.row0);
  if (chunk >= view.chunks) return;
  const int64_t snapshot = view.snapshot(chunk);

  const float scale = static_cast<float>(p.scale);
  if (threadIdx.x == 0) used = 0;
  __syncthreads();
  const int32_t* index = p.index + (row * p.gate_groups + (p.gate_groups == 1 ? 0 : kv_head)) * p.exact_slots;
  const auto* mass = static_cast<const float*>(p.summary_mass) + row * p.summary_slots - p.exact_slots;
  for (int slot = threadIdx.x; slot < p.slots; slot += kPrepareThreads) {
    BankSlot is{kFree, neg_inf<float>()};
    if (slot < p.exact_slots) {
      const int source = index[slot];
      if (source >= 0) {
        is = {source, biased_by_gate(p, slot) ? log_sigmoid(view.gate(p, source)) / scale : 0.0f};
        if (chunk == 0 || index[slot - p.gate_groups * p.exact_slots] != source) {
          const bool carried = source < view.held;
          const int64_t at = carried ? view.state_row(source) : view.token_row(source - view.held);
          (carried ? p.state_entry : p.entry)[at] = 1 + chunk / p.segment * p.slots + slot;
        }
      }
    } else if (slot < p.exact_slots + p.summary_slots && mass[slot] > 0.0f) {
      is = {kSummary, p.mass_bias ? logf(mass[slot]) / scale : 0.0f};
    }
    p.bank[snapshot * p.slots + slot] = is;
    if (is.source != kFree) atomicMax(&used, slot + 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.used[snapshot] = used;

  const auto round_rows = [&](void* to, const void* from) {
    for (int i = threadIdx.x; i < p.summary_slots * (D / kPacket); i += kPrepareThreads) {
      const int64_t at = snapshot * p.summary_slots * D + i * kPacket;
      float x[kPacket] = {};
      if (mass[p.exact_slots + i / (D / kPacket)] > 0.0f) {
#pragma unroll
        for (int e = 0; e < kPacket; ++e) x[e] = static_cast<const float*>(from)[at + e];
      }
      store_packet(static_cast<T*>(to) + at, x);
    }
  };
  round_rows(p.rounded_k, p.summary_k);
  round_rows(p.rounded_v, p.summary_v);

  const int token = view.begin_of(chunk), count = view.end_of(chunk) - token, rows = count * group;
  const auto* lse = static_cast<const float*>(p.lse);
  const auto* delta = static_cast<const float*>(p.delta);
  for (int r = threadIdx.x; r < rows; r += kPrepareThreads) {
    const int64_t at = view.query_row(token * group + r), second = at + (p.streams - 1) * p.tokens * p.heads;
    const int64_t to = view.scalar_row(token * group + r);
    p.scalars[to] = {{lse[at] * kLog2E, lse[second] * kLog2E}, {delta[at], delta[second]}};
    if (p.streams == 2) p.row_lam[to] = static_cast<const float*>(p.lam)[at];
  }

  const bool turned = p.has_bank_distance && p.slots > 0;
  if (turned && threadIdx.x < kPlanes) {
    const int64_t start = view.first - view.lead + static_cast<int64_t>(chunk) * p.chunk;
    bank_angles[threadIdx.x] = rope_angle<float>(p.bank_distance - start, p.inv_freq[threadIdx.x]);
    if (kv_head == 0) p.bank_angles[row * kPlanes + threadIdx.x] = bank_angles[threadIdx.x];
  }
  // Where both turns pair the same dimensions a thread goes from one to the other.
  const bool both = turned && p.streams == 2, together = both && p.rope_interleaved == p.theta_interleaved;
  for (int head0 = 0; head0 < group; head0 += kHeads) {
    const int heads = min(kHeads, group - head0);
    if (p.streams == 2) {
      const auto* theta = static_cast<const float*>(p.theta) + (kv_head * group + head0) * kPlanes;
      for (int i = threadIdx.x; i < heads * kPlanes; i += kPrepareThreads) theta_angles[i] = angle_of(theta[i]);
    }
    __syncthreads();
    constexpr int kUnits = D / 16;
    const auto for_planes = [&](bool interleaved, auto visit) {
      for (int item = threadIdx.x; item < count * heads * kUnits; item += kPrepareThreads) {
        const int unit = item % kUnits, r = item / kUnits;
        Planes<D> planes(view.query_row((token + r / heads) * group + head0 + r % heads) * D, unit, interleaved);
        visit(planes, bank_angles + 8 * unit, theta_angles + r % heads * kPlanes + 8 * unit);
      }
    };
    const bool theta_pairs = p.theta_interleaved, rope_pairs = p.rope_interleaved;
    if (turned) {
      for_planes(rope_pairs, [&](auto& x, const auto* bank, const auto* theta) {
        x.template load<T>(p.q);
        if (together) {
          auto second = x;
          second.turn(theta, theta_pairs);
          second.template store<T>(p.q2);
        }
        x.turn(bank, rope_pairs);
        x.template store<T>(p.bank_q);
        if (!together) return;
        x.template round<T>();
        x.turn(theta, theta_pairs);
        x.template store<T>(p.bank_q2);
      });
    }
    if (p.streams == 2 && !together) {
      for_planes(theta_pairs, [&](auto& x, const auto*, const auto* theta) {
        x.template load<T>(p.q);
        x.turn(theta, theta_pairs);
        x.template store<T>(p.q2);
      });
    }
    __syncthreads();
    if (both && !together) {
      for_planes(theta_pairs, [&](auto& x, const auto*, const auto* theta) {
        x.template load<T>(p.bank_q);
        x.turn(theta, theta_pairs);
        x.template store<T>(p.bank_q2);
      });
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t bounded_backward_prepare(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    const dim3 grid(static_cast<unsigned>(params.chunk_rows * params.kv_heads));
    return launch(prepare_kernel<decltype(zero), dim>, grid, kPrepareThreads, 0, stream, params);
  });
}

}  // namespace coda::kernels::sm80
