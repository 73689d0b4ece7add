#pragma once

// The key-stationary half of the portable attention backward: a warp owns kKeys keys and gathers their gradients in registers, while
// the block walks tiles of 32 query rows. No gradient is added by two blocks, so none needs an atomic.

#include "attention_tiles.cuh"

namespace coda::kernels {

constexpr int kKeys = 4;

template <class A>
struct KeyState {
  A grad_k[kKeys][kVec], grad_v[kKeys][kVec];
  A grad_bias[kKeys];  // this lane's share

  __device__ KeyState() {
#pragma unroll
    for (int l = 0; l < kKeys; ++l) clear(l);
  }

  __device__ void clear(int which) {
#pragma unroll
    for (int l = 0; l < kKeys; ++l) {
      if (l != which) continue;
      grad_bias[l] = A(0);
#pragma unroll
      for (int i = 0; i < kVec; ++i) grad_k[l][i] = grad_v[l][i] = A(0);
    }
  }
};

// One stream of one tile of `count` query rows. queries and grads are shared tiles; dp holds the keys' values . g; lse, delta and
// factor are those of this lane's row (see LineGradient); logit(l, dot) is that of key l for this lane's row.
template <class A, class Logit>
__device__ inline void gather_tile(KeyState<A>& state, const A* key_lines, const A* queries, const A* grads,
                                   const A (&dp)[kKeys], int count, int dim, A lse, A delta, A factor, A scale, Logit logit) {
  A s[kKeys], w[kKeys];
  dot_lines(s, key_lines, queries + lane_id() * row_stride<A>(dim), dim);
#pragma unroll
  for (int l = 0; l < kKeys; ++l) {
    const A x = lane_id() < count ? logit(l, s[l]) : neg_inf<A>();
    w[l] = x > neg_inf<A>() ? factor * exp(x - lse) : A(0);
    const A ds = x > neg_inf<A>() ? w[l] * (dp[l] - delta) : A(0);
    state.grad_bias[l] += ds;
    s[l] = ds * scale;
  }
  accumulate_lines(state.grad_k, s, queries, count, dim);
  accumulate_lines(state.grad_v, w, grads, count, dim);
}

}  // namespace coda::kernels
