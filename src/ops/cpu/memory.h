#pragma once

// The bounded memory as the CPU ops read it: a flat list of sources per sequence, of which slot i of the carried state is source i
// and the j-th new token is source W + Me + j.

#include <vector>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <coda/options.h>
#include <coda/state.h>

#include "../host.h"
#include "tile_attention.h"

namespace coda::cpu {

// Ends of packed sequences; throws where they do not partition `tokens` tokens.
inline std::vector<int64_t> packed_ends(const char* name, const at::Tensor& cu_seqlens, int64_t tokens) {
  const at::Tensor wide = cu_seqlens.to(at::kLong).contiguous();
  std::vector<int64_t> ends(wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel());
  TORCH_CHECK_VALUE(ends.front() == 0 && ends.back() == tokens, name, " must run from 0 to the number of packed tokens; got ",
                    ends.front(), " to ", ends.back(), " for ", tokens, " tokens");
  for (size_t n = 0; n + 1 < ends.size(); ++n) {
    TORCH_CHECK_VALUE(ends[n] <= ends[n + 1], name, " must not decrease; it does at sequence ", n);
  }
  return ends;
}

// The same of sequences of one length.
inline std::vector<int64_t> even_ends(int64_t tokens, int64_t sequences) {
  std::vector<int64_t> ends(sequences + 1);
  for (int64_t n = 0; n <= sequences; ++n) ends[n] = n * (tokens / sequences);
  return ends;
}

// What a bank slot holds of the key at `position` (semantics 3.7): turned back to position 0, rounded once.
template <class S>
void turn_back_row(S* to, const S* from, int64_t dim, int64_t position, const double* inv_freq, Pairs pairs) {
  using T = acc_t<S>;
  std::vector<T> row(dim), cos(dim / 2), sin(dim / 2);
  load_row(row.data(), from, dim);
  rope_angles(cos.data(), sin.data(), inv_freq, dim / 2, position);
  rotate_row(row.data(), cos.data(), sin.data(), dim, pairs, /*inverse=*/true);
  store_row(to, row.data(), dim);
}

// New tokens of packed sequences and the state before them.
template <class S>
struct Memory {
  using T = acc_t<S>;
  MemoryOptions options;
  at::Tensor k, v, gate, inv_freq;
  State state;
  int64_t tokens, sequences, rows;  // T, N, NC
  int64_t kv_heads, dim, groups, window, chunk, exact, summary;
  std::vector<int64_t> ends, seen;

  Memory(const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& gate_, const at::Tensor& cu_seqlens,
         at::TensorList tensors, const at::Tensor& inv_freq_, const MemoryOptions& options_)
      : options(options_), k(k_.contiguous()), v(v_.contiguous()), gate(gate_.contiguous()), inv_freq(inv_freq_.contiguous()),
        state(contiguous_state(tensors)), tokens(k.size(0)), sequences(state.k.size(0)),
        rows(tokens / options.chunk + 2 * sequences), kv_heads(k.size(1)), dim(k.size(2)), groups(state.gate.size(1)),
        window(options.window), chunk(options.chunk), exact(state.exact_pos.size(2)), summary(state.summary_mass.size(1)),
        ends(cu_seqlens.numel() > 0 ? packed_ends("cu_seqlens", cu_seqlens, tokens) : even_ends(tokens, sequences)),
        seen(state.tokens_seen.template const_data_ptr<int64_t>(), state.tokens_seen.template const_data_ptr<int64_t>() + sequences) {}

  int64_t held() const { return window + exact; }
  int64_t group_of(int64_t head) const { return groups == 1 ? 0 : head; }
  const double* frequencies() const { return inv_freq.const_data_ptr<double>(); }
};

// One sequence of it.
template <class S>
struct Sequence {
  using T = acc_t<S>;
  const Memory<S>& m;
  int64_t n;
  int64_t token0, length;  // its new tokens
  int64_t first;           // position of the first
  int64_t row0, chunks;    // its chunk rows

  Sequence(const Memory<S>& memory, int64_t sequence)
      : m(memory), n(sequence), token0(m.ends[n]), length(m.ends[n + 1] - token0), first(m.seen[n]),
        row0(token0 / m.chunk + 2 * n), chunks(length > 0 ? (first + length - 1) / m.chunk - first / m.chunk + 1 : 0) {}

  int64_t end() const { return first + length; }
  // First position of the i-th chunk that the new tokens touch.
  int64_t chunk_start(int64_t i) const { return (first / m.chunk + i) * m.chunk; }
  // First position that the queries of the chunk at `start` see in the ring.
  int64_t window_begin(int64_t start) const { return std::max<int64_t>(0, start - (m.window - m.chunk)); }

  // Whether the chunk at `start` begins in this call and so evicts [start - W, start - W + C).
  bool evicts(int64_t start) const { return start >= first && start >= m.window; }
  // How many of the tokens evicted then are sinks: the leading ones.
  int64_t sinks_at(int64_t start) const {
    return std::clamp<int64_t>(m.options.num_sinks - (start - m.window), 0, m.chunk);
  }

  // The source of a position in the ring or among the new tokens, and back.
  int64_t source_of(int64_t position) const {
    return position < first ? position % m.window : m.held() + position - first;
  }
  int64_t position_of(int64_t source) const {
    return source < m.window ? ring_position(first, source) : first + source - m.held();
  }
  // Position of the last token before `end` that ring slot `slot` took; negative if it never took one.
  int64_t ring_position(int64_t end, int64_t slot) const {
    const int64_t back = (end - 1 - slot) % m.window;
    return end - 1 - (back < 0 ? back + m.window : back);
  }
  // Whether a source is an exact slot, whose key is in the form that banks hold.
  bool in_bank(int64_t source) const { return source >= m.window && source < m.held(); }

  // Rows of (N, Hkv, W + Me) and (T, Hkv).
  int64_t state_row(int64_t slot, int64_t head) const { return (n * m.kv_heads + head) * m.held() + slot; }
  int64_t token_row(int64_t token, int64_t head) const { return (token0 + token) * m.kv_heads + head; }

  // The row of width `width` of a source in a pair of tensors (N, Hkv, W + Me, width) and (T, Hkv, width).
  template <class X>
  X* row(X* carried, X* fresh, int64_t source, int64_t head, int64_t width) const {
    return source < m.held() ? carried + state_row(source, head) * width : fresh + token_row(source - m.held(), head) * width;
  }
  const S* key(int64_t source, int64_t head) const {
    return row(m.state.k.template const_data_ptr<S>(), m.k.template const_data_ptr<S>(), source, head, m.dim);
  }
  const S* value(int64_t source, int64_t head) const {
    return row(m.state.v.template const_data_ptr<S>(), m.v.template const_data_ptr<S>(), source, head, m.dim);
  }
  T gate(int64_t source, int64_t group) const {
    return source < m.held() ? m.state.gate.template const_data_ptr<T>()[(n * m.groups + group) * m.held() + source]
                             : m.gate.template const_data_ptr<T>()[(token0 + source - m.held()) * m.groups + group];
  }

  // Whether a bank turns this source's key back: see bank_key.
  bool turns(int64_t source) const { return m.options.bank_distance && !in_bank(source); }
  // A source's key as a bank holds it.
  void bank_key(S* to, int64_t source, int64_t head) const {
    const S* from = key(source, head);
    if (turns(source)) {
      turn_back_row(to, from, m.dim, position_of(source), m.frequencies(), m.options.rope_pairs);
    } else {
      std::copy_n(from, m.dim, to);
    }
  }
  // The gradient of a source's key from that of its bank form, in place.
  void bank_key_backward(T* grad, int64_t source) const {
    if (!turns(source)) return;
    std::vector<T> cos(m.dim / 2), sin(m.dim / 2);
    rope_angles(cos.data(), sin.data(), m.frequencies(), m.dim / 2, position_of(source));
    rotate_row(grad, cos.data(), sin.data(), m.dim, m.options.rope_pairs);
  }

  // Element 0 of a row of (outer, Hkv, Ms, D).
  int64_t summary_row(int64_t outer, int64_t head, int64_t slot) const {
    return ((outer * m.kv_heads + head) * m.summary + slot) * m.dim;
  }
};

}  // namespace coda::cpu
