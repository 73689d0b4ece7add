#pragma once

// Row-stationary halves of the portable attention kernels. A warp owns kLines query lines, a line being one (row, stream); a row
// is one (token, head of the group) of a KV head. With one stream the lines are 8 rows, with two they are 4 rows twice:
// line l is row l % rows_per_warp, stream l / rows_per_warp. The block's warps share each key tile.

#include "attention_tiles.cuh"

namespace coda::kernels {

constexpr int kLines = 8;

__host__ __device__ inline int rows_per_warp(int streams) { return kLines / streams; }

template <class A>
struct RowState {
  A out[kLines][kVec];
  A peak[kLines], total[kLines];

  __device__ RowState() {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      peak[l] = neg_inf<A>();
      total[l] = A(0);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[l][i] = A(0);
    }
  }
};

// The online softmax: turns the logits of 32 keys, one per lane, into their weights relative to the new peak.
template <class A>
__device__ inline void absorb_logits(RowState<A>& state, A (&p)[kLines]) {
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const A x = p[l], peak = max(state.peak[l], warp_max(x)), base = peak == neg_inf<A>() ? A(0) : peak;
    const A shrink = exp(state.peak[l] - base);
    p[l] = exp(x - base);
    state.total[l] = state.total[l] * shrink + warp_sum(p[l]);
    state.peak[l] = peak;
#pragma unroll
    for (int i = 0; i < kVec; ++i) state.out[l][i] *= shrink;
  }
}

// One tile of `count` keys, the block together. keys() and values() load the shared tile; logit(l, dot) is line l's logit for this
// lane's key, -inf where it does not see it.
template <class A, class Keys, class Values, class Logit>
__device__ inline void attend_tile(RowState<A>& state, const A* lines, A* tile, int count, int dim, Keys keys, Values values,
                                   Logit logit) {
  __syncthreads();
  keys();
  __syncthreads();
  A p[kLines];
  dot_lines(p, lines, tile + lane_id() * row_stride<A>(dim), dim);
#pragma unroll
  for (int l = 0; l < kLines; ++l) p[l] = lane_id() < count ? logit(l, p[l]) : neg_inf<A>();
  absorb_logits(state, p);
  __syncthreads();
  values();
  __syncthreads();
  accumulate_lines(state.out, p, tile, count, dim);
}

// Where finished rows go. T tokens over all sequences.
template <class T>
struct RowOutputs {
  T* y;                         // (T, H, D)
  T* o2;                        // (T, H, D) or null
  T* diff;                      // (T, H, D) or null
  acc_t<T>* lse;                // (streams, T, H) or null
  const acc_t<T>* lam;          // (T, H) or null
  const acc_t<T>* norm_weight;  // (D) or null
  acc_t<T> norm_eps;
};

// One row of a warp: o1 and o2 are softmax outputs (o2 ignored with one stream); at = token * H + head.
template <class T>
__device__ inline void finish_row(const RowOutputs<T>& to, acc_t<T> (&o1)[kVec], const acc_t<T> (&o2)[kVec], int64_t at,
                                  int dim) {
  using A = acc_t<T>;
  if (to.lam) {
    const A lam = to.lam[at];
    for_elements(dim, [&](int i, int d) {
      if (to.o2) to.o2[at * dim + d] = narrow<T>(o2[i]);
      o1[i] -= lam * o2[i];
    });
  }
  A rstd = A(1);
  if (to.norm_weight) {
    A square = A(0);
    for_elements(dim, [&](int i, int) { square += o1[i] * o1[i]; });
    rstd = A(1) / sqrt(warp_sum(square) / dim + to.norm_eps);
  }
  for_elements(dim, [&](int i, int d) {
    if (to.diff) to.diff[at * dim + d] = narrow<T>(o1[i]);
    to.y[at * dim + d] = narrow<T>(to.norm_weight ? o1[i] * rstd * to.norm_weight[d] : o1[i]);
  });
}

template <class A>
__device__ inline void divide_by_total(RowState<A>& state) {
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const A inverse = state.total[l] == A(0) ? A(0) : A(1) / state.total[l];
#pragma unroll
    for (int i = 0; i < kVec; ++i) state.out[l][i] *= inverse;
  }
}

template <class A>
__device__ inline A log_sum_exp(A peak, A total) {
  return total == A(0) ? neg_inf<A>() : peak + log(total);
}

// Writes the warp's rows; at(r) is token * H + head of row r, or -1 past the end. `size` is T * H.
template <class T, class At>
__device__ inline void finish_rows(const RowOutputs<T>& to, RowState<acc_t<T>>& state, int streams, int dim, int64_t size,
                                   At at) {
  divide_by_total(state);
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const int rows = rows_per_warp(streams);
    const int64_t where = at(l % rows);
    if (to.lse && where >= 0 && lane_id() == 0) {
      to.lse[(l / rows) * size + where] = log_sum_exp(state.peak[l], state.total[l]);
    }
  }
#pragma unroll
  for (int r = 0; r < kLines; ++r) {
    if (r >= rows_per_warp(streams)) break;
    const int64_t where = at(r);
    if (where >= 0) finish_row<T>(to, state.out[r], state.out[(r + kLines / 2) % kLines], where, dim);
  }
}

// What the backward knows of a line besides its query; lane l holds line l's.
template <class A>
struct LineGradient {
  A lse, delta, factor;  // log sum exp; rowsum(g * o); 1 for the first stream, -lambda for the second
};

// One tile of the backward: adds dS K to grad_q. grads holds the warp's g rows. Returns in ds[l] the gradient of line l's logit for
// this lane's key.
template <class A, class Keys, class Values, class Logit>
__device__ inline void backward_tile(A (&grad_q)[kLines][kVec], const A* lines, const A* grads, const LineGradient<A>& mine,
                                     int streams, A* tile, int count, int dim, A scale, Keys keys, Values values, Logit logit) {
  const A* row = tile + lane_id() * row_stride<A>(dim);
  __syncthreads();
  values();
  __syncthreads();
  A ds[kLines];
  if (streams == 2) {
    A dp[kLines / 2];
    dot_lines(dp, grads, row, dim);
#pragma unroll
    for (int l = 0; l < kLines; ++l) ds[l] = dp[l % (kLines / 2)];
  } else {
    dot_lines(ds, grads, row, dim);
  }
  __syncthreads();
  keys();
  __syncthreads();
  A s[kLines];
  dot_lines(s, lines, row, dim);
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const A lse = __shfl_sync(kAllLanes, mine.lse, l), delta = __shfl_sync(kAllLanes, mine.delta, l);
    const A factor = __shfl_sync(kAllLanes, mine.factor, l);
    const A x = lane_id() < count ? logit(l, s[l]) : neg_inf<A>();
    ds[l] = x > neg_inf<A>() ? factor * exp(x - lse) * (ds[l] - delta) * scale : A(0);
  }
  accumulate_lines(grad_q, ds, tile, count, dim);
}

// Ends one span of keys that met the same queries: takes d theta of its second stream, turns both streams' gradients back to q and
// leaves their sum in the lines of the first stream, zero in those of the second. Overwrites the query lines: afterwards the
// second stream's line holds each element's share of d theta (a pair's two elements sum to its d theta), 0 without theta.
template <class A, class TurnOf>
__device__ inline void fold_streams(A (&grad_q)[kLines][kVec], A* lines, int streams, int dim, TurnOf turn_of) {
  const int stride = row_stride<A>(dim);
#pragma unroll
  for (int r = 0; r < kLines; ++r) {
    if (r >= rows_per_warp(streams)) break;
    A* first = lines + r * stride;
    const QueryTurn<A> turn = turn_of(r);
    const QueryTurn<A> bank_only{turn.bank, turn.bank_interleaved, nullptr, false};
    if (streams == 2) {
      constexpr int half = kLines / 2;
      A(&dq2)[kVec] = grad_q[(r + half) % kLines];
      A* second = lines + (r + half) * stride;
      A share[kVec];
      __syncwarp();
      for_elements(dim, [&](int i, int d) {
        const bool is_first = turn.theta_interleaved ? d % 2 == 0 : d < dim / 2;
        const int partner = turn.theta_interleaved ? d ^ 1 : (is_first ? d + dim / 2 : d - dim / 2);
        share[i] = is_first ? -dq2[i] * second[partner] : dq2[i] * second[partner];
      });
      __syncwarp();
      for_elements(dim, [&](int i, int d) { first[d] = dq2[i]; });
      turn_query_back(first, dim, QueryTurn<A>{nullptr, false, turn.theta, turn.theta_interleaved});
      for_elements(dim, [&](int i, int d) {
        grad_q[r][i] += first[d];
        dq2[i] = A(0);
        second[d] = share[i];
      });
    }
    if (turn.bank) {
      __syncwarp();
      for_elements(dim, [&](int i, int d) { first[d] = grad_q[r][i]; });
      turn_query_back(first, dim, bank_only);
      for_elements(dim, [&](int i, int d) { grad_q[r][i] = first[d]; });
    }
    __syncwarp();
  }
}

// After fold_streams, the whole block: adds the d theta of each head, summed over the block's rows in order, to partial (H, D/2).
// Warp w's lines begin at lines + w * warp_lines; the block's rows are row0, row0 + 1, ..., `rows` of them.
template <class A>
__device__ inline void sum_theta_shares(A* partial, const A* lines, int warp_lines, int64_t row0, int64_t rows, int group,
                                        int head0, int dim, bool interleaved) {
  constexpr int warp_rows = kLines / 2;
  const int half = dim / 2, stride = row_stride<A>(dim);
  for (int item = threadIdx.x; item < group * half; item += blockDim.x) {
    const int g = item / half, i = item % half;
    A sum = A(0);
    for (int r = (g - static_cast<int>(row0 % group) + group) % group; r < rows; r += group) {
      const A* share = lines + (r / warp_rows) * warp_lines + (warp_rows + r % warp_rows) * stride;
      sum += share[first_of_pair(i, interleaved)] + share[second_of_pair(i, dim, interleaved)];
    }
    partial[(head0 + g) * half + i] += sum;
  }
}

}  // namespace coda::kernels
