#include "backward.cuh"

namespace coda::kernels::sm80 {
namespace {

constexpr int kStepKeys = 32;  // keys of a step
static_assert(4 * kStepKeys == kThreads);

template <int D, int Streams>
constexpr size_t backward_rows_shared() {
  return sizeof(uint16_t) * D * (2 * kRows + query_block_rows(Streams) + 4 * kStepKeys) + 4 * kStepKeys * sizeof(BankSlot);
}

// The two accumulators of plane i of a lane's D / 8, in one row, and the plane's number.
template <int D, bool Interleaved>
struct LanePlane {
  int n_a, n_b, c_a, c_b, number;

  __device__ explicit LanePlane(int i)
      : n_a(Interleaved ? i : i / 2), n_b(Interleaved ? i : i / 2 + D / 16), c_a(Interleaved ? 0 : i % 2),
        c_b(Interleaved ? 1 : i % 2), number(Interleaved ? 4 * i + lane_id() % 4 : 8 * n_a + lane_id() % 4 * 2 + c_a) {}
};

// Where a row's share of a plane's dtheta stands among those of the block: the lanes that write together hit different banks.
template <int D>
__device__ inline int share_place(int row, int plane) {
  return row * (D / 2) + (plane ^ (row % (D / 16) % 8 * 8));
}

// Turns 16 rows of dq2 back to dq and adds them to `to`; leaves what they give to dtheta. `second` are the rows of q2, angles[r]
// those of the head of the lane's r-th row.
template <int D, bool Interleaved, class T>
__device__ inline void fold_second(float (&to)[D / 8][4], float (&x)[D / 8][4], const T* second, float* shares,
                                   const Angle<float>* const (&angles)[2]) {
  const int column = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    const LanePlane<D, Interleaved> plane(i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_id() / 4 + 8 * r;
      float a = x[plane.n_a][2 * r + plane.c_a], b = x[plane.n_b][2 * r + plane.c_b];
      const float q_a = widen(second[place<D>(row, plane.n_a) + column + plane.c_a]);
      const float q_b = widen(second[place<D>(row, plane.n_b) + column + plane.c_b]);
      shares[share_place<D>(row, plane.number)] = b * q_a - a * q_b;
      const Angle<float> angle = angles[r][plane.number];
      turn_pair(a, b, {angle.cos, -angle.sin});
      to[plane.n_a][2 * r + plane.c_a] += a;
      to[plane.n_b][2 * r + plane.c_b] += b;
    }
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) x[i / 4][i % 4] = 0.0f;
}

// Turns 16 rows by the transpose of one turn.
template <int D, bool Interleaved>
__device__ inline void turn_back(float (&x)[D / 8][4], const Angle<float>* angles) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    const LanePlane<D, Interleaved> plane(i);
    const Angle<float> angle = angles[plane.number];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      turn_pair(x[plane.n_a][2 * r + plane.c_a], x[plane.n_b][2 * r + plane.c_b], {angle.cos, -angle.sin});
    }
  }
}

// grad_q and the shares of grad_theta, for rows of one chunk: first the bank with the queries turned towards it, then the window
// with the queries as they are.
template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 2) backward_rows_kernel(const __grid_constant__ BoundedBackward p) {
  constexpr int kBlock = query_block_rows(Streams), kGrads = 3 - Streams, kStage = 2 * kStepKeys * D;
  extern __shared__ __align__(256) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  T* grads = queries + 2 * kRows * D;
  T* stages = grads + kBlock * D;
  auto* slots = reinterpret_cast<BankSlot*>(stages + 2 * kStage);  // of three steps, and of one that has no biases

  const int tiles = row_tiles(p), tile = blockIdx.x % tiles, kv_head = blockIdx.x / tiles % p.kv_heads;
  const int64_t chunk_row = blockIdx.x / tiles / p.kv_heads;
  const HeadView& view = block_view(p, sequence_of_row(p, chunk_row), kv_head);
  const int chunk = static_cast<int>(chunk_row - view.row0);
  if (chunk >= view.chunks) return;
  const int row0 = view.begin_of(chunk) * view.group + tile * kBlock;
  const int rows = min(kBlock, view.end_of(chunk) * view.group - row0);
  if (rows <= 0) return;

  const auto load_queries = [&](const void* first, const void* second) {
    for_packets<D, kBlock>([&](int row, int packet) {
      const bool real = row < rows;
      const int64_t at = view.query_row(row0 + (real ? row : 0)) * D + packet * 8;
      T* to = queries + place<D>(row, packet);
      copy_packet(to, static_cast<const T*>(first) + at, real);
      if (Streams == 2) copy_packet(to + kRows * D, static_cast<const T*>(second) + at, real);
    });
  };
  // Everything that can be brought at once, before the numbers that depend on others.
  const bool turned = p.has_bank_distance && p.slots > 0;
  const BankSlot* bank = p.bank + view.snapshot(chunk) * p.slots;
  slots[threadIdx.x] = p.slots > 0 && threadIdx.x < 2 * kStepKeys ? bank[threadIdx.x] : BankSlot{kFree, 0.0f};
  load_queries(turned ? p.bank_q : p.q, turned ? p.bank_q2 : p.q2);
  for_packets<D, kBlock>([&](int row, int packet) {
    const bool real = row < rows;
    const int64_t at = view.query_row(row0 + (real ? row : 0)) * D + packet * 8;
    copy_packet(grads + place<D>(row, packet), static_cast<const T*>(p.grad_diff) + at, real);
  });

  // The window begins with token `oldest`, which the ring holds where that is negative.
  const int oldest = max(chunk * p.chunk - view.lead - (p.window - p.chunk),
                         -static_cast<int>(min(view.first, static_cast<int64_t>(p.window))));
  const int oldest_slot = static_cast<int>((view.first + oldest) % p.window);
  const int seen = (row0 + rows - 1) / view.group - oldest + 1;
  const int bank_steps = p.slots > 0 ? (p.used[view.snapshot(chunk)] + kStepKeys - 1) / kStepKeys : 0;
  const int steps = bank_steps + (seen + kStepKeys - 1) / kStepKeys;

  constexpr int kRowsAtOnce = RowWalk<D>::kRowsAtOnce;
  const int thread_row = threadIdx.x / (D / 8), thread_at = threadIdx.x % (D / 8) * 8;
  const auto load_step = [&](int step) {
    T* to = stages + step % 2 * kStage + place<D>(thread_row, threadIdx.x % (D / 8));
    const int key0 = (step - bank_steps) * kStepKeys;
    if (step >= bank_steps && oldest + key0 >= 0) {
      int64_t at = view.token_row(oldest + key0 + thread_row) * D + thread_at;
#pragma unroll
      for (int i = 0; i < kStepKeys / kRowsAtOnce; ++i) {
        const bool real = key0 + thread_row + i * kRowsAtOnce < seen;
        copy_packet(to + i * kRowsAtOnce * D, static_cast<const T*>(p.k) + at, real);
        copy_packet(to + (kStepKeys + i * kRowsAtOnce) * D, static_cast<const T*>(p.v) + at, real);
        at += p.kv_heads * kRowsAtOnce * D;
      }
      return;
    }
#pragma unroll 1
    for (int row = thread_row; row < kStepKeys; row += kRowsAtOnce, to += kRowsAtOnce * D) {
      const T *key = nullptr, *value = nullptr;
      if (step < bank_steps) {
        const int slot = step * kStepKeys + row, source = slots[step % 3 * kStepKeys + row].source;
        key = view.bank_row<D, T>(p, p.state_kbar, p.kbar, p.rounded_k, chunk, slot, source);
        value = view.bank_row<D, T>(p, p.state_v, p.v, p.rounded_v, chunk, slot, source);
      } else if (key0 + row < seen) {
        const int token = oldest + key0 + row;
        int slot = oldest_slot + key0 + row;
        if (slot >= p.window) slot -= p.window;
        const int64_t at = (token < 0 ? view.state_row(slot) : view.token_row(token)) * D;
        key = static_cast<const T*>(token < 0 ? p.state_k : p.k) + at;
        value = static_cast<const T*>(token < 0 ? p.state_v : p.v) + at;
      }
      copy_packet(to, key ? key + thread_at : p.q, key);
      copy_packet(to + kStepKeys * D, key ? value + thread_at : p.q, key);
    }
  };
  __syncthreads();
  load_step(0);
  commit_copies();

  const int first = 16 * warp_id();
  const auto row_of = [&](int m, int r) { return first + lane_id() / 4 + 8 * r + m * kRows; };
  float shift[2][2], delta[2][2], lam[2];
  int visible[kGrads][2];  // keys of the window
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int m = 0; m < kGrads; ++m) {
      const bool real = row_of(m, r) < rows;
      const int row = row0 + (real ? row_of(m, r) : 0);
      visible[m][r] = row / view.group - oldest + 1;
      const RowScalars scalars = real ? p.scalars[view.scalar_row(row)] : RowScalars{};
      if (Streams == 2) {
        lam[r] = real ? p.row_lam[view.scalar_row(row)] : 0.0f;
        shift[1][r] = scalars.shift[1];
        delta[1][r] = scalars.delta[1];
      }
      shift[m][r] = scalars.shift[0];
      delta[m][r] = scalars.delta[0];
    }
  }

  const float scale = static_cast<float>(p.scale), log2_scale = scale * kLog2E;
  float grad_q[2][D / 8][4] = {};
  T* lines = queries + first * D;
  int step = 0;
  for (int span = turned ? 0 : 1; span < 2; ++span) {
    for (const int end = span == 0 ? bank_steps : steps; step < end; ++step) {
      wait_copies<0>();
      __syncthreads();
      if (step + 1 < steps) load_step(step + 1);
      if (step + 2 < bank_steps && threadIdx.x < kStepKeys / 2) {
        copy_packet(slots + (step + 2) % 3 * kStepKeys + 2 * threadIdx.x, bank + (step + 2) * kStepKeys + 2 * threadIdx.x, true);
      }
      commit_copies();
      const T* keys = stages + step % 2 * kStage;
      // Logits start from the biases, and from -inf where the row does not see the key.
      float s[2][kStepKeys / 8][4], dp[kGrads][kStepKeys / 8][4] = {};
      const BankSlot* biases = slots + (step < bank_steps ? step % 3 : 3) * kStepKeys + lane_id() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kStepKeys; ++i) s[i / 16][i % 16 / 4][i % 4] = biases[i % 16 / 4 * 8 + i % 2].bias;
      const int key0 = (step - bank_steps) * kStepKeys;  // of the window
      if (__any_sync(kAllLanes, key0 + kStepKeys > visible[0][0])) {
        const int column = key0 + lane_id() % 4 * 2;
#pragma unroll
        for (int i = 0; i < kStepKeys; ++i) {
          const int key = column + i % 16 / 4 * 8 + i % 2;
          if (key >= visible[i / 16 % kGrads][i % 4 / 2]) s[i / 16][i % 16 / 4][i % 4] = neg_inf<float>();
        }
      }
      multiply_rows_at<D>(s, lines, kRows * D, keys);
      multiply_rows_at<D>(dp, grads + first * D, kRows * D, keys + kStepKeys * D);
#pragma unroll
      for (int i = 0; i < kStepKeys; ++i) {
        const int m = i / 16, n = i % 16 / 4, e = i % 4, r = e / 2;
        float& x = s[m][n][e];
        x = exp2_approximate(fmaf(x, log2_scale, -shift[m][r])) * (dp[m % kGrads][n][e] - delta[m][r]);
        if (Streams == 2 && m == 1) x *= -lam[r];
      }
      multiply_columns_at<D>(grad_q, s, keys);
    }

    // Ends the span: gradients back to q. The second stream's may wait until the end where the two turns commute.
    if (step == 0) wait_copies<0>();  // a bank that is empty
    __syncthreads();
    if (Streams == 2 && (span == 1 || p.theta_interleaved != p.rope_interleaved)) {
      auto* shares = reinterpret_cast<float*>(stages + (step + 1) % 2 * kStage);  // no copies go there
      const Angle<float>* angles[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        angles[r] = p.theta_angles + (view.kv_head * view.group + (row0 + row_of(0, r)) % view.group) * (D / 2);
      }
      const auto fold = [&](auto interleaved) {
        fold_second<D, interleaved>(grad_q[0], grad_q[1], lines + kRows * D, shares + first * (D / 2), angles);
      };
      if (p.theta_interleaved) {
        fold(std::true_type());
      } else {
        fold(std::false_type());
      }
      __syncthreads();
      float* partial = static_cast<float*>(p.theta_partial) +
                       ((chunk_row * tiles + tile) * p.heads + view.kv_head * view.group) * (D / 2);
      for (int item = threadIdx.x; item < view.group * (D / 2); item += kThreads) {
        const int plane = item % (D / 2);
        float sum = 0.0f;
        for (int row = (item / (D / 2) - row0 % view.group + view.group) % view.group; row < rows; row += view.group) {
          sum += shares[share_place<D>(row, plane)];
        }
        partial[item] += sum * scale;
      }
    }
    if (span == 0) {
      load_queries(p.q, p.q2);
      commit_copies();
      const Angle<float>* angles = p.bank_angles + chunk_row * (D / 2);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (p.rope_interleaved) {
          turn_back<D, true>(grad_q[m], angles);
        } else {
          turn_back<D, false>(grad_q[m], angles);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kGrads; ++m) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) grad_q[m][i / 4][i % 4] *= scale;
    scatter_rows<D>(grad_q[m], lines, [&](int row) -> T* {
      row += first + m * kRows;
      return row < rows ? static_cast<T*>(p.grad_q) + view.query_row(row0 + row) * D : nullptr;
    });
  }
}

}  // namespace

cudaError_t bounded_backward_rows(const BoundedBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>(params.chunk_rows * row_tiles(params) * params.kv_heads));
    return params.streams == 2
               ? launch(backward_rows_kernel<T, dim, 2>, grid, kThreads, backward_rows_shared<dim, 2>(), stream, params)
               : launch(backward_rows_kernel<T, dim, 1>, grid, kThreads, backward_rows_shared<dim, 1>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
