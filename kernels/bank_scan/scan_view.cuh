#pragma once

#include "../common/numeric.cuh"
#include "../common/ring.cuh"
#include "params.h"

namespace coda::kernels {

// One sequence of a scan.
template <class T>
struct ScanView {
  using A = acc_t<T>;
  const BankScanParams& p;
  int64_t n;
  Span span;

  __device__ ScanView(const BankScanParams& params, int64_t sequence)
      : p(params), n(sequence), span(params.cu_seqlens, params.tokens_seen, sequence, params.chunk) {}

  __device__ int held() const { return p.window + p.exact_slots; }
  __device__ int64_t state_row(int slot, int head) const { return (n * p.kv_heads + head) * held() + slot; }
  __device__ int64_t token_row(int64_t token, int head) const { return (span.token0 + token) * p.kv_heads + head; }
  __device__ int64_t summary_row(int64_t outer, int head, int slot) const {
    return ((outer * p.kv_heads + head) * p.summary_slots + slot) * p.dim;
  }

  __device__ const T* row(const void* state, const void* fresh, int64_t source, int head) const {
    return source < held() ? static_cast<const T*>(state) + state_row(static_cast<int>(source), head) * p.dim
                           : static_cast<const T*>(fresh) + token_row(source - held(), head) * p.dim;
  }
  __device__ const T* bank_key(int64_t source, int head) const { return row(p.state_kbar, p.kbar, source, head); }
  __device__ const T* value(int64_t source, int head) const { return row(p.state_v, p.v, source, head); }
  __device__ A gate(int64_t source, int group) const {
    return source < held() ? static_cast<const A*>(p.state_gate)[(n * p.gate_groups + group) * held() + source]
                           : static_cast<const A*>(p.gate)[(span.token0 + source - held()) * p.gate_groups + group];
  }

  // The flat source of a position in the ring or among the new tokens.
  __device__ int source_of(int64_t position) const {
    return static_cast<int>(position < span.first ? position % p.window : held() + position - span.first);
  }
  // Position of the token in flat source `source`, below W or a new one.
  __device__ int64_t position_of(int64_t source) const {
    return source < p.window ? ring_position(span.first, static_cast<int>(source), p.window)
                             : span.first + source - held();
  }
  // Whether the chunk that starts at `start` begins in this call and so evicts [start - W, start - W + C).
  __device__ bool evicts(int64_t start) const { return start >= span.first && start >= p.window; }
  // How many of the evicted tokens are sinks: the leading ones.
  __device__ int sinks_at(int64_t start) const {
    const int64_t sinks = p.num_sinks - (start - p.window);
    return static_cast<int>(sinks < 0 ? 0 : sinks < p.chunk ? sinks : p.chunk);
  }
  __device__ int64_t index_row(int64_t i, int group) const {
    return ((span.row0 + i) * p.gate_groups + group) * p.exact_slots;
  }
};

// The counts of a sequence in the new state: those that it came with and what is added. One thread.
__device__ inline void write_counts(const BankScanForward& p, int64_t n, int64_t inserts, int64_t hits) {
  p.new_counts[2 * n] = p.counts[2 * n] + inserts;
  p.new_counts[2 * n + 1] = p.counts[2 * n + 1] + hits;
}

}  // namespace coda::kernels
