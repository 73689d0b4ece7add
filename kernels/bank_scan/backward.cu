#include "../common/launch.cuh"
#include "../common/rotation.cuh"
#include "../common/sequences.cuh"
#include "launch.h"
#include "scan_view.cuh"
#include "summary.cuh"

namespace coda::kernels {
namespace {

constexpr int kWarps = 8;

// Where the gradients of flat source `source` of one sequence and head gather.
template <class T>
struct SourceGradient {
  using A = acc_t<T>;
  A *k, *v, *gate;

  __device__ SourceGradient(const BankScanBackward& p, const ScanView<T>& view, int64_t source, int head) {
    const bool carried = source < view.held();
    const int64_t row =
        carried ? view.state_row(static_cast<int>(source), head) : view.token_row(source - view.held(), head);
    k = static_cast<A*>(carried ? p.grad_state_k : p.grad_k) + row * p.dim;
    v = static_cast<A*>(carried ? p.grad_state_v : p.grad_v) + row * p.dim;
    gate = static_cast<A*>(carried ? p.state_gate_partial : p.gate_partial) + row;
  }
};

// What the new state's slots give back to the slots and tokens that they are copies of, except bank slots that were filled in this
// call. One warp per new token and per carried slot, of one KV head.
template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) copies_kernel(BankScanBackward p) {
  using A = acc_t<T>;
  const int held = p.window + p.exact_slots;
  int64_t item = blockIdx.x * static_cast<int64_t>(kWarps) + warp_id();
  const int head = static_cast<int>(item % p.kv_heads);
  item /= p.kv_heads;
  if (item >= p.tokens + p.sequences * held) return;
  const bool carried = item >= p.tokens;
  const int64_t n = carried ? (item - p.tokens) / held
                            : find_sequence(p.sequences, item, [&](int64_t m) { return p.cu_seqlens[m]; });
  const ScanView<T> view(p, n);
  const int group = p.gate_groups == 1 ? 0 : head;
  const int64_t source = carried ? (item - p.tokens) % held : held + item - p.cu_seqlens[n];
  int slot = -1;  // of the new state, that still holds this source
  if (!carried) {
    const int64_t position = view.position_of(source);
    if (position >= view.span.end() - p.window) slot = static_cast<int>(position % p.window);
  } else if (source < p.window) {
    const int64_t position = ring_position(view.span.end(), static_cast<int>(source), p.window);
    if (position < view.span.first) slot = static_cast<int>(source);
  } else {
    const int from = p.source[(n * p.gate_groups + group) * p.exact_slots + source - p.window];
    if (from < 0 || from == source) slot = static_cast<int>(source);
  }
  const SourceGradient<T> to(p, view, source, head);
  const int64_t from = view.state_row(slot, head) * p.dim;
  for (int d = lane_id(); d < p.dim; d += kWarp) {
    to.k[d] = slot < 0 ? A(0) : static_cast<A>(widen(static_cast<const T*>(p.grad_new_k)[from + d]));
    to.v[d] = slot < 0 ? A(0) : static_cast<A>(widen(static_cast<const T*>(p.grad_new_v)[from + d]));
  }
  if (lane_id() == 0) {
    const int64_t at = (n * p.gate_groups + group) * held + slot;
    *to.gate = slot < 0 || head != group ? A(0) : static_cast<const A*>(p.grad_new_gate)[at];
  }
}

// The exact slots that were filled in this call: a token fills one slot of its group at most. One warp a slot and KV head.
template <class T>
__global__ void __launch_bounds__(kWarps * kWarp) exact_slots_kernel(BankScanBackward p) {
  using A = acc_t<T>;
  const int64_t item = blockIdx.x * static_cast<int64_t>(kWarps) + warp_id();
  if (item >= p.sequences * p.kv_heads * p.exact_slots) return;
  const int slot = static_cast<int>(item % p.exact_slots), head = static_cast<int>(item / p.exact_slots % p.kv_heads);
  const ScanView<T> view(p, item / p.exact_slots / p.kv_heads);
  const int group = p.gate_groups == 1 ? 0 : head;
  const int source = p.source[(view.n * p.gate_groups + group) * p.exact_slots + slot];
  if (source < 0 || source == p.window + slot) return;
  const SourceGradient<T> to(p, view, source, head);
  const int64_t from = view.state_row(p.window + slot, head) * p.dim;
  const bool turned = p.has_bank_distance && (source < p.window || source >= view.held());
  const int64_t position = turned ? view.position_of(source) : 0;
  for (int i = lane_id(); i < p.dim / 2; i += kWarp) {
    const int first = first_of_pair(i, p.rope_interleaved), second = second_of_pair(i, p.dim, p.rope_interleaved);
    A a = widen(static_cast<const T*>(p.grad_new_k)[from + first]);
    A b = widen(static_cast<const T*>(p.grad_new_k)[from + second]);
    if (turned) turn_pair(a, b, rope_angle<A>(position, p.inv_freq[i]));
    to.k[first] += a;
    to.k[second] += b;
  }
  for (int d = lane_id(); d < p.dim; d += kWarp) to.v[d] += widen(static_cast<const T*>(p.grad_new_v)[from + d]);
  if (lane_id() == 0 && head == group) {
    *to.gate += static_cast<const A*>(p.grad_new_gate)[(view.n * p.gate_groups + group) * view.held() + p.window + slot];
  }
}

// The summary bank backwards through the chunks. Slots meet only in the assignment, which is a constant, so one warp follows one
// slot of one KV head; the mass and the gates, which heads share, get each head's share apart. Of the D / 2 pairs of a row, one
// lane has kPairs: lane + 32 u.
template <class T, int kPairs>
__global__ void __launch_bounds__(kWarps * kWarp) summary_kernel(BankScanBackward p) {
  using A = acc_t<T>;
  constexpr int kBatch = 32 / (kPairs * sizeof(A));  // members of a slot whose rows are read together
  const int64_t item = blockIdx.x * static_cast<int64_t>(kWarps) + warp_id();
  if (item >= p.sequences * p.summary_slots * p.kv_heads) return;
  const int head = static_cast<int>(item % p.kv_heads), slot = static_cast<int>(item / p.kv_heads % p.summary_slots);
  const ScanView<T> view(p, item / p.kv_heads / p.summary_slots);
  const SummaryRule rule{p.summary_slots, p.kv_heads, p.dim, 0.0, 0.0, p.low_freq_key, p.rope_interleaved};
  const int dim = p.dim, half = dim / 2;
  const A log_stay = log_sigmoid(-static_cast<const A*>(p.eta_logit)[head]);  // log(1 - eta)
  const A eta = sigmoid(static_cast<const A*>(p.eta_logit)[head]);

  const auto add_row = [&](A(&to)[kPairs][2], const void* rows, int64_t row) {
    const A* from = static_cast<const A*>(rows) + view.summary_row(row, head, slot);
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const int i = lane_id() + u * kWarp;
      if (i >= half) break;
      to[u][0] += from[first_of_pair(i, p.rope_interleaved)];
      to[u][1] += from[second_of_pair(i, dim, p.rope_interleaved)];
    }
  };
  const auto set = [](A(&to)[kPairs][2], A factor) {
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      to[u][0] = factor == A(0) ? A(0) : to[u][0] * factor;
      to[u][1] = factor == A(0) ? A(0) : to[u][1] * factor;
    }
  };
  A grad_k[kPairs][2] = {}, grad_v[kPairs][2] = {};
  add_row(grad_k, p.grad_new_summary_k, view.n);
  add_row(grad_v, p.grad_new_summary_v, view.n);
  A grad_mass = static_cast<const A*>(p.grad_new_summary_mass)[view.n * p.summary_slots + slot];
  A grad_eta_logit = A(0);
  for (int64_t i = view.span.chunks - 1; i >= 0; --i) {
    const int64_t row = view.span.row0 + i, start = view.span.chunk_start(i, p.chunk), evicted = start - p.window;
    if (!(static_cast<const A*>(p.summary_mass)[row * p.summary_slots + slot] > A(0))) {
      set(grad_k, A(0));
      set(grad_v, A(0));
      grad_mass = A(0);
      continue;
    }
    add_row(grad_k, p.grad_summary_k, row);
    add_row(grad_v, p.grad_summary_v, row);
    grad_mass += static_cast<const A*>(p.grad_summary_mass)[row * p.summary_slots + slot];
    if (!view.evicts(start)) continue;

    const auto pairs = [&](auto f) {
#pragma unroll
      for (int u = 0; u < kPairs; ++u) {
        const int j = lane_id() + u * kWarp;
        if (j >= half) break;
        f(u, 0, first_of_pair(j, p.rope_interleaved));
        f(u, 1, second_of_pair(j, dim, p.rope_interleaved));
      }
    };
    struct Member {
      int c;  // -1 none
      int64_t source;
      A gate, k[kPairs][2], v[kPairs][2];
    };
    // f takes members in order, a batch at a time: a slot has few, and what costs is the wait for each row.
    const auto members = [&](auto f) {
#pragma unroll 1
      for (int base = 0; base < p.chunk; base += kWarp) {
        const int mine = base + lane_id();
        unsigned left = __ballot_sync(kAllLanes, mine < p.chunk && p.assignment[row * p.chunk + mine] == slot);
#pragma unroll 1
        while (left != 0) {
          Member batch[kBatch];
#pragma unroll
          for (auto& member : batch) {
            member.c = left == 0 ? -1 : base + __ffs(left) - 1;
            left &= left - 1;
            if (member.c < 0) continue;
            member.source = view.source_of(evicted + member.c);
            const T *k = view.bank_key(member.source, head), *v = view.value(member.source, head);
            member.gate = view.gate(member.source, 0);
            pairs([&](int u, int e, int d) {
              member.k[u][e] = static_cast<A>(widen(k[d]));
              member.v[u][e] = static_cast<A>(widen(v[d]));
            });
          }
#pragma unroll
          for (auto& member : batch) member.gate = sigmoid(member.gate);
          f(batch);
        }
      }
    };
    A mass = A(0), mean_k[kPairs][2] = {}, mean_v[kPairs][2] = {};
    members([&](const auto& batch) {
#pragma unroll
      for (const auto& member : batch) {
        if (member.c < 0) continue;
        mass += member.gate;
        pairs([&](int u, int e, int) {
          mean_k[u][e] += member.gate * member.k[u][e];
          mean_v[u][e] += member.gate * member.v[u][e];
        });
      }
    });
    if (!(mass > A(0))) continue;
    pairs([&](int u, int e, int d) {
      mean_k[u][e] *= rule.key_factor<A>(d) / mass;
      mean_v[u][e] /= mass;
    });
    const void* before_mass = i == 0 ? p.state_summary_mass : p.summary_mass;
    const int64_t before = i == 0 ? view.n : row - 1;
    const bool used = static_cast<const A*>(before_mass)[before * p.summary_slots + slot] > A(0);
    A rate = A(1), share_mass = head == 0 ? grad_mass : A(0);
    if (used) {
      A grad_rate = A(0);
      const A* old_k = static_cast<const A*>(i == 0 ? p.state_summary_k : p.summary_k) + view.summary_row(before, head, slot);
      const A* old_v = static_cast<const A*>(i == 0 ? p.state_summary_v : p.summary_v) + view.summary_row(before, head, slot);
      pairs([&](int u, int e, int d) {
        grad_rate += grad_k[u][e] * (mean_k[u][e] - old_k[d]) + grad_v[u][e] * (mean_v[u][e] - old_v[d]);
      });
      grad_rate = warp_sum(grad_rate);
      const A stay = exp(mass * log_stay);
      rate = A(1) - stay;
      share_mass -= grad_rate * stay * log_stay;
      grad_eta_logit += grad_rate * mass * stay * eta;
    }
    members([&](auto& batch) {
      A along[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (batch[b].c < 0) continue;
        pairs([&](int u, int e, int d) {
          along[b] += grad_k[u][e] * (rule.key_factor<A>(d) * batch[b].k[u][e] - mean_k[u][e]) +
                      grad_v[u][e] * (batch[b].v[u][e] - mean_v[u][e]);
        });
        along[b] = warp_sum(along[b]);
        // The row is not needed any more: what its gradient holds so far takes its place.
        const SourceGradient<T> to(p, view, batch[b].source, head);
        pairs([&](int u, int e, int d) {
          batch[b].k[u][e] = to.k[d];
          batch[b].v[u][e] = to.v[d];
        });
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (batch[b].c < 0) continue;
        const SourceGradient<T> to(p, view, batch[b].source, head);
        const A gate = batch[b].gate, weight = rate * gate / mass;
#pragma unroll
        for (int u = 0; u < kPairs; ++u) {
          const int j = lane_id() + u * kWarp;
          if (j >= half) break;
          const int first = first_of_pair(j, p.rope_interleaved), second = second_of_pair(j, dim, p.rope_interleaved);
          A x = weight * rule.key_factor<A>(first) * grad_k[u][0], y = weight * rule.key_factor<A>(second) * grad_k[u][1];
          if (p.has_bank_distance) turn_pair(x, y, rope_angle<A>(evicted + batch[b].c, p.inv_freq[j]));
          to.k[first] = batch[b].k[u][0] + x;
          to.k[second] = batch[b].k[u][1] + y;
          to.v[first] = batch[b].v[u][0] + weight * grad_v[u][0];
          to.v[second] = batch[b].v[u][1] + weight * grad_v[u][1];
        }
        if (lane_id() == 0) *to.gate += (rate * along[b] / mass + share_mass) * gate * (A(1) - gate);
      }
    });
    set(grad_k, used ? A(1) - rate : A(0));
    set(grad_v, used ? A(1) - rate : A(0));
    if (!used) grad_mass = A(0);
  }
  A* to_k = static_cast<A*>(p.grad_state_summary_k) + view.summary_row(view.n, head, slot);
  A* to_v = static_cast<A*>(p.grad_state_summary_v) + view.summary_row(view.n, head, slot);
#pragma unroll
  for (int u = 0; u < kPairs; ++u) {
    const int j = lane_id() + u * kWarp;
    if (j >= half) break;
    const int first = first_of_pair(j, p.rope_interleaved), second = second_of_pair(j, dim, p.rope_interleaved);
    to_k[first] = grad_k[u][0];
    to_k[second] = grad_k[u][1];
    to_v[first] = grad_v[u][0];
    to_v[second] = grad_v[u][1];
  }
  if (lane_id() == 0) {
    if (head == 0) static_cast<A*>(p.grad_state_summary_mass)[view.n * p.summary_slots + slot] = grad_mass;
    static_cast<A*>(p.eta_partial)[(view.n * p.summary_slots + slot) * p.kv_heads + head] = grad_eta_logit;
  }
}

inline dim3 warps_grid(int64_t items) { return dim3(static_cast<unsigned>((items + kWarps - 1) / kWarps)); }

}  // namespace

cudaError_t bank_scan_backward(const BankScanBackward& params, DType dtype, cudaStream_t stream) {
  const auto& p = params;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = (p.tokens + p.sequences * (p.window + p.exact_slots)) * p.kv_heads;
    auto status = launch(copies_kernel<T>, warps_grid(rows), kWarps * kWarp, 0, stream, p);
    if (status != cudaSuccess) return status;
    status = launch(exact_slots_kernel<T>, warps_grid(p.sequences * p.kv_heads * p.exact_slots), kWarps * kWarp, 0, stream, p);
    if (status != cudaSuccess) return status;
    const auto kernel = p.dim <= 128 ? summary_kernel<T, 2> : summary_kernel<T, 4>;
    return launch(kernel, warps_grid(p.sequences * p.summary_slots * p.kv_heads), kWarps * kWarp, 0, stream, p);
  });
}

}  // namespace coda::kernels
