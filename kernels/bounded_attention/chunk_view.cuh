#pragma once

#include "../common/attention_tiles.cuh"
#include "../common/ring.cuh"
#include "chunk_rows.cuh"

namespace coda::kernels {

// One sequence as one KV head sees it.
template <class T>
struct SequenceView {
  using A = acc_t<T>;
  const BoundedAttentionParams& p;
  int64_t n;
  int kv_head, gate_group, group;
  Span span;

  __device__ SequenceView(const BoundedAttentionParams& params, int64_t sequence, int head)
      : p(params), n(sequence), kv_head(head), gate_group(params.gate_groups == 1 ? 0 : head),
        group(params.heads / params.kv_heads), span(params.cu_seqlens, params.tokens_seen, sequence, params.chunk) {}

  __device__ int held() const { return p.window + p.exact_slots; }
  // Rows of (N, Hkv, W + Me) and (T, Hkv).
  __device__ int64_t state_row(int slot) const { return (n * p.kv_heads + kv_head) * held() + slot; }
  __device__ int64_t token_row(int64_t token) const { return (span.token0 + token) * p.kv_heads + kv_head; }

  // The row of flat source `source` in one of the pairs (state, new tokens).
  __device__ const T* row(const void* state, const void* fresh, int64_t source) const {
    return source < held() ? static_cast<const T*>(state) + state_row(static_cast<int>(source)) * p.dim
                           : static_cast<const T*>(fresh) + token_row(source - held()) * p.dim;
  }
  __device__ const T* bank_key(int64_t source) const { return row(p.state_kbar, p.kbar, source); }
  __device__ const T* value(int64_t source) const { return row(p.state_v, p.v, source); }
  __device__ A gate(int64_t source) const {
    return source < held()
               ? static_cast<const A*>(p.state_gate)[(n * p.gate_groups + gate_group) * held() + source]
               : static_cast<const A*>(p.gate)[(span.token0 + source - held()) * p.gate_groups + gate_group];
  }
  // The flat source of a position that the ring still holds or that is new.
  __device__ int64_t source_of(int64_t position) const {
    return position < span.first ? position % p.window : held() + position - span.first;
  }

  // Row r of a run of query rows that begins with new token `token`: token * H + head.
  __device__ int head(int64_t r) const { return kv_head * group + static_cast<int>(r % group); }
  __device__ int64_t at(int64_t token, int64_t r) const { return (span.token0 + token + r / group) * p.heads + head(r); }
};

// One chunk of it.
template <class T>
struct ChunkView : SequenceView<T> {
  using A = acc_t<T>;
  using SequenceView<T>::p;
  using SequenceView<T>::span;
  int64_t snapshot;      // chunk row
  int64_t start;         // first position of the chunk
  int64_t token;         // its first new token, within the sequence
  int count;             // new tokens in it
  int64_t window_begin;  // first position that its queries see in the ring

  __device__ ChunkView(const SequenceView<T>& sequence, int64_t i) : SequenceView<T>(sequence), snapshot(span.row0 + i) {
    start = span.chunk_start(i, p.chunk);
    const int64_t begin = start > span.first ? start : span.first;
    const int64_t end = start + p.chunk < span.end() ? start + p.chunk : span.end();
    token = begin - span.first;
    count = static_cast<int>(end - begin);
    window_begin = start - (p.window - p.chunk) > 0 ? start - (p.window - p.chunk) : 0;
  }

  __device__ int rows() const { return count * this->group; }
  __device__ int64_t position(int64_t r) const { return span.first + token + r / this->group; }
  __device__ int64_t at(int64_t r) const { return SequenceView<T>::at(token, r); }

  __device__ int source(int slot) const {
    return p.index[(snapshot * p.gate_groups + this->gate_group) * p.exact_slots + slot];
  }
  __device__ bool biased_by_gate(int slot) const { return p.gate_bias && slot >= p.num_sinks; }
  __device__ A exact_bias(int slot) const {
    const int from = source(slot);
    if (from < 0) return neg_inf<A>();
    return biased_by_gate(slot) ? log_sigmoid(this->gate(from)) : A(0);
  }
  __device__ A mass(int slot) const { return static_cast<const A*>(p.summary_mass)[snapshot * p.summary_slots + slot]; }
  __device__ A summary_bias(int slot) const {
    const A held = mass(slot);
    if (!(held > A(0))) return neg_inf<A>();
    return p.mass_bias ? log(held) : A(0);
  }
  __device__ int64_t summary_row(int slot) const {
    return (snapshot * p.kv_heads + this->kv_head) * p.summary_slots + slot;
  }

  // R(bank_distance - start), by the whole block; ends with a barrier.
  __device__ void bank_angles(Angle<A>* to) const {
    if (!p.has_bank_distance) return;
    for (int i = threadIdx.x; i < p.dim / 2; i += blockDim.x) {
      to[i] = rope_angle<A>(p.bank_distance - start, p.inv_freq[i]);
    }
    __syncthreads();
  }
  __device__ QueryTurn<A> turn(int64_t r, int stream, const Angle<A>* bank) const {
    const A* theta = stream ? static_cast<const A*>(p.theta) + this->head(r) * (p.dim / 2) : nullptr;
    return {p.has_bank_distance ? bank : nullptr, p.rope_interleaved, theta, p.theta_interleaved};
  }
};

// Calls tile(count, keys, values, bias) for every tile of the bank: exact slots, then summary slots. keys(j) and values(j) give the
// row of the tile's slot j (null where free), bias the slot bias of this lane's slot.
template <class T, class TileOf>
__device__ inline void for_bank_tiles(const ChunkView<T>& chunk, TileOf tile) {
  using A = acc_t<T>;
  const auto& p = chunk.p;
  for (int slot = 0; slot < p.exact_slots; slot += kTile) {
    const int count = min(kTile, p.exact_slots - slot);
    const A bias = lane_id() < count ? chunk.exact_bias(slot + lane_id()) : neg_inf<A>();
    const auto from = [&](bool key) {
      return [&chunk, slot, key](int j) -> const T* {
        const int source = chunk.source(slot + j);
        return source < 0 ? nullptr : key ? chunk.bank_key(source) : chunk.value(source);
      };
    };
    tile(count, from(true), from(false), bias);
  }
  for (int slot = 0; slot < p.summary_slots; slot += kTile) {
    const int count = min(kTile, p.summary_slots - slot);
    const A bias = lane_id() < count ? chunk.summary_bias(slot + lane_id()) : neg_inf<A>();
    const auto from = [&](const void* rows) {
      return [&chunk, slot, rows](int j) -> const A* {
        return chunk.mass(slot + j) > A(0) ? static_cast<const A*>(rows) + chunk.summary_row(slot + j) * chunk.p.dim : nullptr;
      };
    };
    tile(count, from(p.summary_k), from(p.summary_v), bias);
  }
}

// Calls tile(count, keys, values, position0) for every tile of ring and new tokens that positions up to `last` see.
template <class T, class TileOf>
__device__ inline void for_window_tiles(const ChunkView<T>& chunk, int64_t last, TileOf tile) {
  const auto& p = chunk.p;
  for (int64_t position = chunk.window_begin; position <= last; position += kTile) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kTile), last + 1 - position));
    tile(
        count, [&chunk, &p, position](int j) { return chunk.row(p.state_k, p.k, chunk.source_of(position + j)); },
        [&chunk, position](int j) { return chunk.value(chunk.source_of(position + j)); }, position);
  }
}

}  // namespace coda::kernels
