#include "backward.h"
#include "tiles.cuh"

namespace coda::kernels::sm80 {
namespace {

constexpr int kKeys = 16 * kWarps;  // keys of a block, 16 a warp
constexpr int kStep = 32;           // query rows of a step

// What the rows of a step bring to every key. There is one copy only: a second one would leave room for one block less on a
// multiprocessor with 164 KiB of shared memory.
struct RowScalars {
  float lse[2][kStep], delta[2][kStep], lam[kStep];
};

template <int D, int Streams>
constexpr size_t backward_keys_shared() {
  return sizeof(uint16_t) * D * (2 * kKeys + 2 * (Streams + 1) * kStep) + sizeof(RowScalars);
}

// grad_k and grad_v: the block walks the query rows that see its keys, head after head of their group. Products are transposed,
// so that a warp's keys are the rows of its accumulators, and the weights of one product are the operand of the next. Reads q2
// as the rows' kernel left it.
template <class T, int D, int Streams>
__global__ void __launch_bounds__(kThreads, 2) backward_keys_kernel(DiffAttentionBackward p) {
  constexpr int kStage = (Streams + 1) * kStep * D;  // q, q2 and grad_diff
  extern __shared__ __align__(128) unsigned char shared[];
  T* keys = reinterpret_cast<T*>(shared);
  T* values = keys + kKeys * D;
  T* stages = values + kKeys * D;
  auto& scalars = *reinterpret_cast<RowScalars*>(stages + 2 * kStage);

  const int kv_head = blockIdx.x % p.kv_heads, group = p.heads / p.kv_heads;
  const auto where = find_key_tile(p, blockIdx.x / p.kv_heads, kKeys);
  const Sequence sequence(p, where.sequence);
  if (where.begin >= sequence.keys) return;
  const int key0 = static_cast<int>(where.begin), count = sequence.keys - key0;
  // The first query that sees this lane's upper key. The first that sees any key of the block begins the walk.
  const int diagonal = key0 - (sequence.keys - sequence.queries), query0 = p.causal ? max(0, diagonal) / kStep * kStep : 0;
  const int first = 16 * warp_id(), first_query = p.causal ? diagonal + first + lane_id() / 4 : -kKeys;

  struct Step {
    int head, query, stage;  // head within the group
  };
  const auto after = [&](Step step) -> Step {
    const bool same_head = step.query + kStep < sequence.queries;
    return {same_head ? step.head : step.head + 1, same_head ? step.query + kStep : query0, step.stage ^ 1};
  };
  const int64_t q_stride = p.q_strides.token, stride = static_cast<int64_t>(p.heads) * D;
  const T* q = sequence.q<T>(p, kv_head * group);
  const int64_t first_row = sequence.query0 * p.heads + kv_head * group;
  const auto load_step = [&](Step step) {
    const int left = sequence.queries - step.query;
    const int64_t at = (first_row + static_cast<int64_t>(step.query) * p.heads + step.head) * D;
    T* stage = stages + step.stage * kStage;
    load_tile<D, kStep>(stage, q + step.query * q_stride + step.head * p.q_strides.head, q_stride, left);
    if (Streams == 2) load_tile<D, kStep>(stage + kStep * D, static_cast<const T*>(p.workspace) + at, stride, left);
    load_tile<D, kStep>(stage + Streams * kStep * D, static_cast<const T*>(p.grad_diff) + at, stride, left);
  };
  const auto load_scalars = [&](Step step) {
    const int row = threadIdx.x % kStep, stream = threadIdx.x / kStep, query = step.query + row;
    if (stream >= Streams) return;
    const bool real = query < sequence.queries;
    const int64_t at = first_row + static_cast<int64_t>(query) * p.heads + step.head;
    const int64_t stream_at = at + stream * p.queries * p.heads;
    copy_word(&scalars.lse[stream][row], static_cast<const float*>(p.lse) + stream_at, real);
    copy_word(&scalars.delta[stream][row], static_cast<const float*>(p.delta) + stream_at, real);
    if (stream == 1) copy_word(&scalars.lam[row], static_cast<const float*>(p.lam) + at, real);
  };

  const int64_t k_stride = p.k_strides.token, v_stride = p.v_strides.token;
  load_tile<D, kKeys>(keys, sequence.k<T>(p, kv_head) + key0 * k_stride, k_stride, count);
  load_tile<D, kKeys>(values, sequence.v<T>(p, kv_head) + key0 * v_stride, v_stride, count);
  Step step{query0 < sequence.queries ? 0 : group, query0, 0};
  if (step.head < group) load_step(step);
  commit_copies();

  const int64_t at = ((sequence.key0 + key0 + first) * p.kv_heads + kv_head) * D;
  const int column = lane_id() % 4 * 2;
  const float scale = static_cast<float>(p.scale), log2_scale = scale * kLog2E;
  float grad_k[1][D / 8][4] = {}, grad_v[1][D / 8][4] = {};
  for (Step next; step.head < group; step = next) {
    wait_copies<0>();
    __syncthreads();
    load_scalars(step);
    commit_copies();
    next = after(step);
    if (next.head < group) load_step(next);
    commit_copies();
    const T* queries = stages + step.stage * kStage;
    const T* grads = queries + Streams * kStep * D;
    float s[1][Streams * kStep / 8][4] = {}, dp[1][kStep / 8][4] = {};
    multiply_rows<D>(s, keys + first * D, 0, queries);
    multiply_rows<D>(dp, values + first * D, 0, grads);
    wait_copies<1>();
    __syncthreads();

    // s becomes the gradient of the logits, and dp the weights that the values had in the output.
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) {
      const int n = i / 4, e = i % 4, row = 8 * n + column + e % 2;
      const bool hidden = step.query + row < first_query + e / 2 * 8;
      float weights = 0.0f;
#pragma unroll
      for (int stream = 0; stream < Streams; ++stream) {
        float& x = s[0][n + stream * (kStep / 8)][e];
        float weight = exp2_approximate(fmaf(x, log2_scale, -scalars.lse[stream][row] * kLog2E));
        if (stream == 1) weight *= -scalars.lam[row];
        if (hidden) weight = 0.0f;
        weights += weight;
        x = weight * (dp[0][n][e] - scalars.delta[stream][row]);
      }
      dp[0][n][e] = weights;
    }
    multiply_columns<D>(grad_v, dp, grads);
    multiply_columns<D>(grad_k, s, queries);
  }
  wait_copies<0>();
  __syncthreads();

#pragma unroll
  for (int i = 0; i < D / 2; ++i) grad_k[0][i / 4][i % 4] *= scale;
  const auto store = [&](void* to, const float(&x)[D / 8][4]) {
    write_rows<D>(static_cast<T*>(to) + at, static_cast<int64_t>(p.kv_heads) * D, count - first, x, keys + first * D);
  };
  store(p.grad_k, grad_k[0]);
  store(p.grad_v, grad_v[0]);
}

}  // namespace

cudaError_t backward_keys(const DiffAttentionBackward& params, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, params.dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    const int64_t tiles = params.keys ? tile_bound(params.keys, params.sequences, kKeys) : 0;
    const dim3 grid(static_cast<unsigned>(tiles * params.kv_heads));
    return params.streams == 2
               ? launch(backward_keys_kernel<T, dim, 2>, grid, kThreads, backward_keys_shared<dim, 2>(), stream, params)
               : launch(backward_keys_kernel<T, dim, 1>, grid, kThreads, backward_keys_shared<dim, 1>(), stream, params);
  });
}

}  // namespace coda::kernels::sm80
