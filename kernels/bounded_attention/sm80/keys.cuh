#pragma once

// The key-stationary half of the backward. Each of a block's warps holds 16 keys, with their gradients in registers; the block
// walks query rows. Products are transposed, so that a warp's keys are the rows of its accumulators and the weights of one
// product are the operand of the next.

#include "backward.cuh"

namespace coda::kernels::sm80 {

constexpr int kKeys = kSlotTile;  // keys of a block, slots or tokens
constexpr int kStep = 32;           // query rows of a step

struct StepScalars {
  RowScalars rows[kStep];
  float lam[kStep];
};

template <int D, int Streams>
constexpr size_t keys_shared() {
  return sizeof(uint16_t) * D * (2 * kKeys + 2 * (Streams + 1) * kStep) + 2 * sizeof(StepScalars);
}

template <class T, int D, int Streams>
struct KeysMemory {
  static constexpr int kStage = (Streams + 1) * kStep * D;  // q, q2 and grad_diff
  T *keys, *values;      // of the warp
  T* stages;             // two
  StepScalars* scalars;  // two

  __device__ explicit KeysMemory(unsigned char* shared) {
    T* tiles = reinterpret_cast<T*>(shared);
    keys = tiles + warp_id() * 16 * D;
    values = keys + kKeys * D;
    stages = tiles + 2 * kKeys * D;
    scalars = reinterpret_cast<StepScalars*>(stages + 2 * kStage);
  }

  // Brings rows [row, row + kStep), at which `walk` stands; zeros from `end` on.
  __device__ void load_step(const BoundedBackward& p, const HeadView& view, const void* q, const void* q2, RowWalk<D>& walk,
                            int stage, int row, int end) const {
    const int64_t base = view.query_row(0) * D;
    const int group = view.group;
    const int thread_row = threadIdx.x / walk.kPackets;
    T* to = stages + stage * kStage + place<D>(thread_row, threadIdx.x % walk.kPackets);
#pragma unroll
    for (int i = 0; i < kStep / walk.kRowsAtOnce; ++i) {
      const bool real = row + i * walk.kRowsAtOnce + thread_row < end;
      const int64_t at = base + static_cast<int64_t>(walk.at) * 8;
      copy_packet(to, static_cast<const T*>(q) + at, real);
      if (Streams == 2) copy_packet(to + kStep * D, static_cast<const T*>(q2) + at, real);
      copy_packet(to + Streams * kStep * D, static_cast<const T*>(p.grad_diff) + at, real);
      to += walk.kRowsAtOnce * D;
      walk.next(p, group);
    }
    if (threadIdx.x < kStep) {
      const bool real = row + threadIdx.x < end;
      const int64_t at = view.scalar_row(row) + threadIdx.x;
      copy_packet(scalars[stage].rows + threadIdx.x, p.scalars + at, real);
      if (Streams == 2) copy_word(scalars[stage].lam + threadIdx.x, p.row_lam + at, real);
    }
  }
};

// Accumulators of a warp's 16 keys; a lane's share of the biases' gradients is of its two rows.
template <int D>
struct KeyGradients {
  float k[1][D / 8][4], v[1][D / 8][4], bias[2];

  __device__ void clear(int r) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      k[0][n][2 * r] = k[0][n][2 * r + 1] = 0.0f;
      v[0][n][2 * r] = v[0][n][2 * r + 1] = 0.0f;
    }
    bias[r] = 0.0f;
  }
};

// One step of rows. Logits start from start(row, r), for a row of the step and the lane's r-th key: a bias over the scale, -inf
// where the key is not seen.
template <int Streams, class T, int D, class Start>
__device__ inline void gather_step(KeyGradients<D>& sum, const KeysMemory<T, D, Streams>& memory, int stage, float log2_scale,
                                   Start start) {
  const T* queries = memory.stages + stage * memory.kStage;
  const T* grads = queries + Streams * kStep * D;
  const StepScalars& scalars = memory.scalars[stage];
  float s[1][Streams * kStep / 8][4], dp[1][kStep / 8][4] = {};
#pragma unroll
  for (int i = 0; i < kStep / 2; ++i) {
    const int n = i / 4, e = i % 4;
    s[0][n][e] = start(8 * n + lane_id() % 4 * 2 + e % 2, e / 2);
    if (Streams == 2) s[0][n + kStep / 8 * (Streams - 1)][e] = s[0][n][e];
  }
  multiply_rows_at<D>(s, memory.keys, 0, queries);
  multiply_rows_at<D>(dp, memory.values, 0, grads);
  // s becomes the gradient of the logits, and dp the weights that the values had in the output.
#pragma unroll
  for (int i = 0; i < kStep / 4; ++i) {
    const int n = i / 2, c = i % 2, row = 8 * n + lane_id() % 4 * 2 + c;
    const RowScalars of = scalars.rows[row];
    const float lam = Streams == 2 ? scalars.lam[row] : 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int e = 2 * r + c;
      float weights = 0.0f;
#pragma unroll
      for (int stream = 0; stream < Streams; ++stream) {
        float& x = s[0][n + stream * (kStep / 8)][e];
        float weight = exp2_approximate(fmaf(x, log2_scale, -of.shift[stream]));
        if (stream == 1) weight *= -lam;
        weights = stream == 0 ? weight : weights + weight;
        x = weight * (dp[0][n][e] - of.delta[stream]);
        sum.bias[r] += x;
      }
      dp[0][n][e] = weights;
    }
  }
  multiply_columns_at<D>(sum.v, dp, grads);
  multiply_columns_at<D>(sum.k, s, queries);
}

}  // namespace coda::kernels::sm80
