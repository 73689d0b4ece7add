#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "../memory_args.h"
#include "banks.h"
#include "epilogue.h"
#include "memory.h"

namespace coda::cpu {
namespace {

// Tokens of one unit of forward work: many enough that loading the bank once for all of its chunks costs little.
constexpr int64_t kUnitTokens = 1024;

template <class S>
struct Problem : Memory<S> {
  using T = acc_t<S>;
  at::Tensor q, lam, index, summary_k, summary_v, summary_mass;
  HeadParameters<T> head;
  int64_t heads, group;

  Problem(const at::Tensor& q_, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam_,
          const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
          const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index_, const at::Tensor& summary_k_,
          const at::Tensor& summary_v_, const at::Tensor& summary_mass_, const at::Tensor& inv_freq, const MemoryOptions& memory,
          const AttentionOptions& attention)
      : Memory<S>(k, v, gate, cu_seqlens, state, inv_freq, memory), q(q_.contiguous()), index(index_.contiguous()),
        summary_k(summary_k_.contiguous()), summary_v(summary_v_.contiguous()), summary_mass(summary_mass_.contiguous()),
        head(theta, norm_weight, q_.size(-1), attention.scale, attention.theta_pairs, attention.norm_eps), heads(q_.size(1)),
        group(heads / this->kv_heads) {
    if (lam_) lam = lam_->contiguous();
  }

  int64_t slots() const { return this->exact + this->summary; }
  T lam_of(int64_t at_row) const { return head.two_streams ? static_cast<T>(lam.template const_data_ptr<S>()[at_row]) : T(0); }
};

// One sequence as one KV head sees it.
template <class S>
struct View : Sequence<S> {
  const Problem<S>& p;
  int64_t kv;

  View(const Problem<S>& problem, int64_t n, int64_t kv_head) : Sequence<S>(problem, n), p(problem), kv(kv_head) {}

  int64_t head_of(int64_t r) const { return kv * p.group + r % p.group; }
};

// One chunk of it: query rows are (token, head of the group), its keys those of the ring and its own. Both are those of the whole
// chunk, absent tokens as rows of zeros, so that a token's GEMMs, and its bits, do not depend on how its sequence is cut into calls.
template <class S>
struct Chunk {
  using T = acc_t<S>;
  const View<S>& view;
  const Problem<S>& p;
  int64_t snapshot, start, window_begin;
  int64_t begin, end;  // positions of its new tokens
  int64_t rows, keys;

  Chunk(const View<S>& v, int64_t i)
      : view(v), p(v.p), snapshot(v.row0 + i), start(v.chunk_start(i)), window_begin(v.window_begin(start)),
        begin(std::max(start, v.first)), end(std::min(start + p.chunk, v.end())), rows(p.chunk * p.group),
        keys(start + p.chunk - window_begin) {}

  // token * H + head of a row, -1 for an absent token.
  int64_t at(int64_t r) const {
    const int64_t position = start + r / p.group;
    return position < begin || position >= end ? -1 : (view.token0 + position - view.first) * p.heads + view.head_of(r);
  }
  auto rows_at() const {
    return [this](int64_t r) { return at(r); };
  }
  auto lam() const {
    return [this](int64_t r) { return p.lam_of(at(r)); };
  }
  auto head() const {
    return [this](int64_t r) { return view.head_of(r); };
  }

  // Keys and values (keys, D) of the window.
  void load_window(T* k, T* v) const {
    std::fill_n(k + (end - window_begin) * p.dim, (start + p.chunk - end) * p.dim, T(0));
    std::fill_n(v + (end - window_begin) * p.dim, (start + p.chunk - end) * p.dim, T(0));
    for (int64_t position = window_begin; position < end; ++position, k += p.dim, v += p.dim) {
      const int64_t source = view.source_of(position);
      load_row(k, view.key(source, view.kv), p.dim);
      load_row(v, view.value(source, view.kv), p.dim);
    }
  }
  // How many of them each row sees.
  void visible_keys(std::vector<int64_t>& visible) const {
    visible.resize(rows);
    for (int64_t r = 0; r < rows; ++r) visible[r] = at(r) < 0 ? 0 : start + r / p.group + 1 - window_begin;
  }

  // R(bank_distance - start): what turns this chunk's queries towards the bank.
  struct Turn {
    std::vector<T> cos, sin;
  };
  Turn bank_turn() const {
    Turn turn{std::vector<T>(p.dim / 2), std::vector<T>(p.dim / 2)};
    rope_angles(turn.cos.data(), turn.sin.data(), p.frequencies(), p.dim / 2, *p.options.bank_distance - start);
    return turn;
  }

  // Queries (streams * rows, D), scaled, as they meet the window or, with a turn, the bank.
  void load_queries(T* to, const Turn* turn) const {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = to + r * p.dim;
      if (at(r) < 0) {
        std::fill_n(row, p.dim, T(0));
        continue;
      }
      load_row(row, p.q.template const_data_ptr<S>() + at(r) * p.dim, p.dim);
      if (turn) rotate_row(row, turn->cos.data(), turn->sin.data(), p.dim, p.options.rope_pairs);
      scale_row(row, p.dim, p.head.scale);
    }
    second_stream(to, rows, p.dim, p.head, head());
  }

  T mass(int64_t slot) const { return p.summary_mass.template const_data_ptr<T>()[snapshot * p.summary + slot]; }
};

// The bank as the chunks of one view read it: exact slots, then summary slots. A slot's rows are loaded when its occupant changes.
template <class S>
struct Bank {
  using T = acc_t<S>;
  const View<S>& view;
  const Problem<S>& p;
  T *k, *v;  // (Me + Ms, D)
  std::vector<T> bias;
  std::vector<int64_t> occupant;  // flat source of each exact slot, -1 free
  bool any = false;

  explicit Bank(const View<S>& view_) : view(view_), p(view_.p), bias(p.slots()), occupant(p.exact, -1) {
    k = k_buffer_.take(p.slots() * p.dim);
    v = v_buffer_.take(p.slots() * p.dim);
    std::fill_n(k, p.slots() * p.dim, T(0));
    std::fill_n(v, p.slots() * p.dim, T(0));
  }

  // Takes in a chunk's snapshot. leave(slot) is called before an occupant goes.
  template <class Leave>
  void load(const Chunk<S>& chunk, Leave leave) {
    constexpr T none = -std::numeric_limits<T>::infinity();
    const int64_t group = p.group_of(view.kv);
    const int32_t* chosen = p.index.template const_data_ptr<int32_t>() + (chunk.snapshot * p.groups + group) * p.exact;
    std::vector<S> row(p.dim);
    any = false;
    for (int64_t j = 0; j < p.exact; ++j) {
      if (chosen[j] != occupant[j]) {
        if (occupant[j] >= 0) leave(j);
        occupant[j] = chosen[j];
        if (chosen[j] >= 0) {
          view.bank_key(row.data(), chosen[j], view.kv);
          load_row(k + j * p.dim, row.data(), p.dim);
          load_row(v + j * p.dim, view.value(chosen[j], view.kv), p.dim);
        } else {
          std::fill_n(k + j * p.dim, p.dim, T(0));
          std::fill_n(v + j * p.dim, p.dim, T(0));
        }
      }
      any |= occupant[j] >= 0;
      bias[j] = occupant[j] < 0 ? none : biased(j) ? log_sigmoid(view.gate(occupant[j], group)) : T(0);
    }
    for (int64_t j = 0; j < p.summary; ++j) {
      const int64_t slot = p.exact + j, from = view.summary_row(chunk.snapshot, view.kv, j);
      const bool used = chunk.mass(j) > T(0);
      std::copy_n(p.summary_k.template const_data_ptr<T>() + from, p.dim, k + slot * p.dim);
      std::copy_n(p.summary_v.template const_data_ptr<T>() + from, p.dim, v + slot * p.dim);
      any |= used;
      bias[slot] = !used ? none : p.options.mass_bias ? std::log(chunk.mass(j)) : T(0);
    }
  }

  bool biased(int64_t slot) const { return p.options.gate_bias && slot >= p.options.num_sinks; }
  KeyTile<T> tile() const { return {k, v, p.slots(), bias.data(), nullptr}; }

 private:
  Scratch<T> k_buffer_, v_buffer_;
};

template <class S>
AttentionOutputs<S> forward(const Problem<S>& p, bool save) {
  using T = acc_t<S>;
  AttentionOutputs<S> out(p.q, p.head, save);
  struct Unit {
    int64_t n, kv, begin, end;  // chunks
  };
  std::vector<Unit> units;
  const int64_t unit_chunks = std::max<int64_t>(1, kUnitTokens / p.chunk);
  for (int64_t n = 0; n < p.sequences; ++n) {
    const int64_t chunks = Sequence<S>(p, n).chunks;
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      for (int64_t i = 0; i < chunks; i += unit_chunks) units.push_back({n, kv, i, std::min(i + unit_chunks, chunks)});
    }
  }
  at::parallel_for(0, units.size(), 1, [&](int64_t first, int64_t last) {
    const c10::InferenceMode no_autograd;
    Scratch<T> q_buffer, turned_buffer, k_buffer, v_buffer;
    std::vector<int64_t> visible;
    for (int64_t u = first; u < last; ++u) {
      const View<S> view(p, units[u].n, units[u].kv);
      Bank<S> bank(view);
      for (int64_t i = units[u].begin; i < units[u].end; ++i) {
        const Chunk<S> chunk(view, i);
        T* q = q_buffer.take(chunk.rows * p.head.streams() * p.dim);
        chunk.load_queries(q, nullptr);
        bank.load(chunk, [](int64_t) {});
        TileForward<T> block(chunk.rows, p.head.streams(), p.dim);
        if (bank.any && p.options.bank_distance) {
          const auto turn = chunk.bank_turn();
          T* turned = turned_buffer.take(chunk.rows * p.head.streams() * p.dim);
          chunk.load_queries(turned, &turn);
          block.attend(turned, bank.tile());
        } else if (bank.any) {
          block.attend(q, bank.tile());
        }
        T *k = k_buffer.take(chunk.keys * p.dim), *v = v_buffer.take(chunk.keys * p.dim);
        chunk.load_window(k, v);
        chunk.visible_keys(visible);
        block.attend(q, {k, v, chunk.keys, nullptr, visible.data()});
        out.store(block, chunk.rows, p.dim, p.head, chunk.rows_at(), chunk.lam());
      }
    }
  });
  return out;
}

// Gradients in the accumulation type: a key is read through the ring and through any number of snapshots.
template <class S>
struct Gradients {
  using T = acc_t<S>;
  at::Tensor q, k, v, lam, theta, norm, gate, state_k, state_v, state_gate, summary_k, summary_v, mass;

  explicit Gradients(const Problem<S>& p) {
    const at::TensorOptions wide = p.q.options().dtype(type_of<T>());
    const int64_t units = p.sequences * p.kv_heads;
    q = at::empty(p.q.sizes(), p.q.options());
    k = at::zeros(p.k.sizes(), wide);
    v = at::zeros(p.v.sizes(), wide);
    lam = p.head.two_streams ? at::empty(p.lam.sizes(), p.lam.options()) : at::empty({0}, p.q.options());
    // One share per (sequence, KV head) of what they have in common, added in a fixed order.
    theta = at::zeros({units, p.head.two_streams ? p.heads : 0, p.dim / 2}, wide);
    norm = at::zeros({units, p.dim}, wide);
    gate = at::zeros({p.tokens, p.kv_heads}, wide);
    state_k = at::zeros(p.state.k.sizes(), wide);
    state_v = at::zeros(p.state.v.sizes(), wide);
    state_gate = at::zeros({p.sequences, p.kv_heads, p.held()}, wide);
    summary_k = at::zeros(p.summary_k.sizes(), wide);
    summary_v = at::zeros(p.summary_v.sizes(), wide);
    mass = at::zeros({p.rows, p.kv_heads, p.summary}, wide);
  }
};

template <class S>
void backward(const Problem<S>& p, const Gradients<S>& to, const at::Tensor& grad, const AttentionOutputs<S>& saved, int64_t unit) {
  using T = acc_t<S>;
  const View<S> view(p, unit / p.kv_heads, unit % p.kv_heads);
  if (view.chunks == 0) return;
  const int64_t streams = p.head.streams(), dim = p.dim;
  T* theta_sum = p.head.two_streams ? to.theta.template data_ptr<T>() + unit * p.heads * (dim / 2) : nullptr;
  T* norm_sum = to.norm.template data_ptr<T>() + unit * dim;
  Bank<S> bank(view);
  std::vector<T> bank_gk(p.slots() * dim, T(0)), bank_gv(p.slots() * dim, T(0)), bank_gbias(p.slots(), T(0));

  const auto add = [&](int64_t source, const T* grad_k, const T* grad_v) {
    axpy_row(view.row(to.state_k.template data_ptr<T>(), to.k.template data_ptr<T>(), source, view.kv, dim), grad_k, dim, T(1));
    axpy_row(view.row(to.state_v.template data_ptr<T>(), to.v.template data_ptr<T>(), source, view.kv, dim), grad_v, dim, T(1));
  };
  // An exact slot's gradient goes to the token that it holds.
  const auto leave = [&](int64_t slot) {
    const int64_t source = bank.occupant[slot];
    T *slot_gk = bank_gk.data() + slot * dim, *slot_gv = bank_gv.data() + slot * dim;
    view.bank_key_backward(slot_gk, source);
    add(source, slot_gk, slot_gv);
    if (bank.biased(slot)) {
      T* gate = view.row(to.state_gate.template data_ptr<T>(), to.gate.template data_ptr<T>(), source, view.kv, 1);
      *gate += bank_gbias[slot] * sigmoid(-view.gate(source, p.group_of(view.kv)));
    }
    std::fill_n(slot_gk, dim, T(0));
    std::fill_n(slot_gv, dim, T(0));
    bank_gbias[slot] = T(0);
  };

  std::vector<T> q, turned, g, gq, turned_gq, k, v, gk, gv;
  std::vector<int64_t> visible;
  for (int64_t i = 0; i < view.chunks; ++i) {
    const Chunk<S> chunk(view, i);
    const int64_t size = chunk.rows * streams * dim;
    q.resize(size);
    g.resize(chunk.rows * dim);
    gq.assign(size, T(0));
    chunk.load_queries(q.data(), nullptr);
    bank.load(chunk, leave);
    const RowGradients<T> saved_rows(g.data(), chunk.rows, dim, p.head, grad, saved, chunk.rows_at(), chunk.lam(), to.lam, norm_sum);
    TileBackward<T> block(chunk.rows, streams, dim, g.data(), saved_rows.d.data(), saved_rows.lam.data(), saved_rows.lse.data());
    chunk.visible_keys(visible);
    if (bank.any) {
      const bool turns = p.options.bank_distance.has_value();
      const auto turn = turns ? chunk.bank_turn() : typename Chunk<S>::Turn{};
      if (turns) {
        turned.resize(size);
        chunk.load_queries(turned.data(), &turn);
        turned_gq.assign(size, T(0));
      }
      block.attend(turns ? turned.data() : q.data(), bank.tile(), turns ? turned_gq.data() : gq.data(), bank_gk.data(),
                   bank_gv.data(), bank_gbias.data());
      if (turns) {
        second_stream_backward(turned_gq.data(), turned.data(), chunk.rows, dim, p.head, chunk.head(), theta_sum);
        for (int64_t r = 0; r < chunk.rows; ++r) {
          rotate_row(turned_gq.data() + r * dim, turn.cos.data(), turn.sin.data(), dim, p.options.rope_pairs, /*inverse=*/true);
          axpy_row(gq.data() + r * dim, turned_gq.data() + r * dim, dim, T(1));
        }
      }
    }
    k.resize(chunk.keys * dim);
    v.resize(chunk.keys * dim);
    gk.assign(chunk.keys * dim, T(0));
    gv.assign(chunk.keys * dim, T(0));
    chunk.load_window(k.data(), v.data());
    block.attend(q.data(), {k.data(), v.data(), chunk.keys, nullptr, visible.data()}, gq.data(), gk.data(), gv.data(), nullptr);
    for (int64_t position = chunk.window_begin; position < chunk.end; ++position) {
      const int64_t row = (position - chunk.window_begin) * dim;
      add(view.source_of(position), gk.data() + row, gv.data() + row);
    }
    second_stream_backward(gq.data(), q.data(), chunk.rows, dim, p.head, chunk.head(), theta_sum);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      if (chunk.at(r) < 0) continue;
      scale_row(gq.data() + r * dim, dim, p.head.scale);
      store_row(to.q.template data_ptr<S>() + chunk.at(r) * dim, gq.data() + r * dim, dim);
    }
    for (int64_t j = 0; j < p.summary; ++j) {
      const int64_t slot = p.exact + j, at_row = view.summary_row(chunk.snapshot, view.kv, j);
      if (chunk.mass(j) > T(0)) {
        std::copy_n(bank_gk.data() + slot * dim, dim, to.summary_k.template data_ptr<T>() + at_row);
        std::copy_n(bank_gv.data() + slot * dim, dim, to.summary_v.template data_ptr<T>() + at_row);
        if (p.options.mass_bias) to.mass.template data_ptr<T>()[at_row / dim] = bank_gbias[slot] / chunk.mass(j);
      }
      std::fill_n(bank_gk.data() + slot * dim, dim, T(0));
      std::fill_n(bank_gv.data() + slot * dim, dim, T(0));
      bank_gbias[slot] = T(0);
    }
  }
  for (int64_t j = 0; j < p.exact; ++j) {
    if (bank.occupant[j] >= 0) leave(j);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bounded_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS, bool save) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "coda::bounded_attention", [&] {
    return forward(Problem<scalar_t>(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v,
                                     summary_mass, inv_freq, CODA_MEMORY_OPTIONS, CODA_ATTENTION_OPTIONS),
                   save)
        .tensors();
  });
}

using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                  at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

BackwardResult bounded_attention_backward(
    const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, const at::Tensor& y,
    const at::Tensor& o2, const at::Tensor& diff, const at::Tensor& lse, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "coda::bounded_attention", [&]() -> BackwardResult {
        const Problem<scalar_t> p(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, index, summary_k, summary_v,
                                  summary_mass, inv_freq, CODA_MEMORY_OPTIONS, CODA_ATTENTION_OPTIONS);
        const Gradients<scalar_t> to(p);
        const AttentionOutputs<scalar_t> saved(y, o2, diff, lse);
        const at::Tensor grad = grad_y.contiguous();
        at::parallel_for(0, p.sequences * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
          const c10::InferenceMode no_autograd;
          for (int64_t unit = begin; unit < end; ++unit) backward(p, to, grad, saved, unit);
        });
        const auto dtype = q.scalar_type();
        const auto none = at::empty({0}, to.theta.options());
        const bool shared = p.groups < p.kv_heads;
        return {to.q,
                to.k.to(dtype),
                to.v.to(dtype),
                to.lam,
                theta ? to.theta.sum(0).to(theta->scalar_type()) : none,
                norm_weight ? to.norm.sum(0).to(norm_weight->scalar_type()) : none,
                shared ? to.gate.sum(1, true) : to.gate,
                to.state_k.to(dtype),
                to.state_v.to(dtype),
                shared ? to.state_gate.sum(1, true) : to.state_gate,
                to.summary_k,
                to.summary_v,
                to.mass.sum(1)};
      });
}

std::tuple<std::string, std::string> bounded_attention_path(const at::Tensor& /*q*/, std::optional<double> /*scale*/) {
  return {"cpu", "q is on the CPU"};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) {
  m.impl("bounded_attention_path", bounded_attention_path);
  m.impl("_bounded_attention_forward", bounded_attention_forward);
  m.impl("_bounded_attention_backward", bounded_attention_backward);
}

}  // namespace coda::cpu
