#include "check.h"

#include <initializer_list>
#include <utility>

#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>
#include <coda/state.h>

namespace coda {
namespace {

constexpr int64_t kMaxHeadDim = 256;

void expect_shape(const char* name, const at::Tensor& t, const char* meaning, std::initializer_list<c10::SymInt> sizes) {
  const c10::SymIntArrayRef shape(sizes);
  TORCH_CHECK_VALUE(t.sym_sizes() == shape, name, " has shape ", t.sym_sizes(), "; here it must be ", meaning, " = ", shape);
}

void expect_dtype(const char* name, const at::Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, name, " is of ", t.scalar_type(), "; here it must be of ", dtype,
                    ", so convert it");
}

void expect_device(const char* name, const at::Tensor& t, const char* main_name, const at::Tensor& main) {
  TORCH_CHECK_VALUE(t.device() == main.device(), name, " is on ", t.device(), " but ", main_name, " is on ", main.device(),
                    "; move one of them");
}

void expect_floating(const char* name, const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, name,
                    " is of ", dtype, "; float16, bfloat16, float32 and float64 are supported");
}

at::ScalarType wide(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_head_dim(const char* name, const at::Tensor& t) {
  const auto dim = t.sym_size(-1);
  TORCH_CHECK_VALUE(dim >= 2 && dim % 2 == 0 && dim <= kMaxHeadDim, name, " has shape ", t.sym_sizes(), " and so head_dim ",
                    dim, "; an even head_dim of 2 to ", kMaxHeadDim, " is supported");
}

void check_inv_freq(const at::Tensor& inv_freq, const char* main_name, const at::Tensor& main) {
  expect_dtype("inv_freq", inv_freq, at::kDouble);
  expect_shape("inv_freq", inv_freq, "(D/2)", {main.sym_size(-1) / 2});
  expect_device("inv_freq", inv_freq, main_name, main);
}

// Keys and values of `dim` dimensions, (..., Hkv, D).
void check_keys(const at::Tensor& k, const at::Tensor& v, int64_t dim, const char* layout) {
  TORCH_CHECK_VALUE(k.dim() == dim, "k has shape ", k.sym_sizes(), "; keys are ", layout, " here");
  TORCH_CHECK_VALUE(k.sym_size(-2) >= 1, "k has shape ", k.sym_sizes(), " and no KV head; at least one is needed");
  check_head_dim("k", k);
  expect_floating("k", k);
  TORCH_CHECK_VALUE(v.sym_sizes() == k.sym_sizes(), "v has shape ", v.sym_sizes(), " but k has shape ", k.sym_sizes(),
                    "; every key needs one value of the same head_dim");
  TORCH_CHECK_VALUE(v.scalar_type() == k.scalar_type(), "v is of ", v.scalar_type(), " but k is of ", k.scalar_type(),
                    "; convert one of them");
  expect_device("v", v, "k", k);
}

// Queries beside checked keys.
void check_queries(const at::Tensor& q, const at::Tensor& k) {
  TORCH_CHECK_VALUE(q.dim() == k.dim(), "q has shape ", q.sym_sizes(), " but k has shape ", k.sym_sizes(),
                    "; give both as dense (batch, tokens, heads, D) or both as packed (tokens, heads, D)");
  TORCH_CHECK_VALUE(q.sym_size(-1) == k.sym_size(-1), "q has shape ", q.sym_sizes(), " but k has shape ", k.sym_sizes(),
                    "; queries and keys need the same head_dim");
  const auto heads = q.sym_size(-2), kv_heads = k.sym_size(-2);
  TORCH_CHECK_VALUE(heads >= 1 && heads % kv_heads == 0, "q has ", heads, " heads and k has ", kv_heads,
                    "; every KV head must serve the same number of query heads, at least one");
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type(), "q is of ", q.scalar_type(), " but k is of ", k.scalar_type(),
                    "; convert one of them");
  expect_device("q", q, "k", k);
}

void check_same_tokens(const at::Tensor& q, const at::Tensor& k) {
  TORCH_CHECK_VALUE(q.sym_sizes().slice(0, q.dim() - 2) == k.sym_sizes().slice(0, k.dim() - 2), "q has shape ", q.sym_sizes(),
                    " but k has shape ", k.sym_sizes(), "; every new token needs its query and its key");
}

void check_head_parameters(const at::Tensor& q, const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                           const std::optional<at::Tensor>& norm_weight) {
  TORCH_CHECK_VALUE(lam.has_value() == theta.has_value(), lam ? "lam" : "theta", " is given without ", lam ? "theta" : "lam",
                    "; give both for differential attention or neither for one stream");
  if (lam) {
    TORCH_CHECK_VALUE(lam->sym_sizes() == q.sym_sizes().slice(0, q.dim() - 1), "lam has shape ", lam->sym_sizes(),
                      " but q has shape ", q.sym_sizes(), "; lam is one number per token and query head, q's shape without D");
    TORCH_CHECK_VALUE(lam->scalar_type() == q.scalar_type(), "lam is of ", lam->scalar_type(), " but q is of ",
                      q.scalar_type(), "; convert one of them");
    expect_device("lam", *lam, "q", q);
    expect_floating("theta", *theta);
    expect_shape("theta", *theta, "(H, D/2)", {q.sym_size(-2), q.sym_size(-1) / 2});
    expect_device("theta", *theta, "q", q);
  }
  if (norm_weight) {
    expect_floating("norm_weight", *norm_weight);
    expect_shape("norm_weight", *norm_weight, "(D)", {q.sym_size(-1)});
    expect_device("norm_weight", *norm_weight, "q", q);
  }
}

void check_cu_seqlens(const char* name, const at::Tensor& cu_seqlens, const at::Tensor& k) {
  TORCH_CHECK_VALUE(cu_seqlens.scalar_type() == at::kInt || cu_seqlens.scalar_type() == at::kLong, name, " is of ",
                    cu_seqlens.scalar_type(), "; int32 and int64 are supported");
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.sym_size(0) >= 2, name, " has shape ", cu_seqlens.sym_sizes(),
                    "; it must be (N + 1) for N >= 1 sequences: 0, then the end of each");
  expect_device(name, cu_seqlens, "k", k);
}

// The sequences of packed tokens: of cu_seqlens, or, where that has size 0, those of the state, all of one length.
c10::SymInt check_sequences(const at::Tensor& cu_seqlens, const at::Tensor& k, at::TensorList state) {
  if (cu_seqlens.sym_numel() != 0) {
    check_cu_seqlens("cu_seqlens", cu_seqlens, k);
    return cu_seqlens.sym_size(0) - 1;
  }
  const auto sequences = State::from_tensors(state).tokens_seen.sym_numel();
  TORCH_CHECK_VALUE(sequences >= 1 && k.sym_size(0) % sequences == 0, "cu_seqlens is empty, so that all sequences are of one "
                    "length, but ", k.sym_size(0), " tokens are no multiple of ", sequences, " sequences");
  return sequences;
}

void check_memory(const MemoryOptions& m) {
  TORCH_CHECK_VALUE(m.chunk >= 1, "chunk=", m.chunk, " is not supported; it is a number of tokens >= 1");
  TORCH_CHECK_VALUE(m.window >= 1 && m.window % m.chunk == 0, "window=", m.window, " is not supported with chunk=", m.chunk,
                    "; the window must be a positive multiple of the chunk");
  TORCH_CHECK_VALUE(m.num_sinks >= 0, "num_sinks=", m.num_sinks, " is not supported; it is a number of slots >= 0");
  TORCH_CHECK_VALUE(m.exact_candidates >= 0, "exact_candidates=", m.exact_candidates,
                    " is not supported; it is a number of tokens >= 0");
  TORCH_CHECK_VALUE(m.bank_distance.value_or(0) >= 0, "bank_distance=", *m.bank_distance,
                    " is not supported; it is a number of tokens >= 0, or none for true positions");
  TORCH_CHECK_VALUE(m.age_decay >= 0.0, "age_decay=", m.age_decay, " is not supported; it is a rate per token >= 0");
  for (const auto& [name, tau] : {std::pair{"tau_exact", m.tau_exact}, std::pair{"tau_summary", m.tau_summary}}) {
    TORCH_CHECK_VALUE(tau >= 0.0 && tau < 1.0, name, "=", tau, " is not supported; a gate threshold lies in [0, 1)");
  }
}

// The state of `sequences` sequences whose new keys are `k`.
void check_state(at::TensorList tensors, const c10::SymInt& sequences, const at::Tensor& k, const MemoryOptions& m) {
  const auto state = State::from_tensors(tensors);
  for (const auto& t : tensors) {
    TORCH_CHECK_VALUE(t.defined(), "the state holds a tensor that was never set; start from make_state");
    expect_device("a tensor of the state", t, "k", k);
  }
  TORCH_CHECK_VALUE(state.k.dim() == 4 && state.gate.dim() == 3 && state.exact_pos.dim() == 3 && state.summary_mass.dim() == 2,
                    "the state's k, gate, exact_pos and summary_mass have ", state.k.dim(), ", ", state.gate.dim(), ", ",
                    state.exact_pos.dim(), " and ", state.summary_mass.dim(),
                    " dimensions instead of 4, 3, 3 and 2; start from make_state");
  const auto kv_heads = k.sym_size(-2), dim = k.sym_size(-1);
  const auto exact = state.exact_pos.sym_size(2), summary = state.summary_mass.sym_size(1), groups = state.gate.sym_size(1);
  const auto slots = exact + m.window;
  TORCH_CHECK_VALUE(state.k.sym_size(0) == sequences, "state.k has shape ", state.k.sym_sizes(), " and so ",
                    state.k.sym_size(0), " sequences, but the new tokens have ", sequences, " (k has shape ", k.sym_sizes(),
                    "); use a state with the batch that it was made for");
  TORCH_CHECK_VALUE(state.k.sym_size(1) == kv_heads && state.k.sym_size(2) == slots && state.k.sym_size(3) == dim,
                    "state.k has shape ", state.k.sym_sizes(), " and k has shape ", k.sym_sizes(), "; with window=", m.window,
                    " and ", exact, " exact slots state.k must be (N, Hkv, W + Me, D) = [", sequences, ", ", kv_heads, ", ",
                    slots, ", ", dim, "], so use the state made for this configuration");
  TORCH_CHECK_VALUE(state.k.scalar_type() == k.scalar_type(), "state.k is of ", state.k.scalar_type(), " but k is of ",
                    k.scalar_type(), "; make the state with the dtype of the keys");
  expect_dtype("state.v", state.v, k.scalar_type());
  expect_shape("state.v", state.v, "(N, Hkv, W + Me, D)", {sequences, kv_heads, slots, dim});
  TORCH_CHECK_VALUE(groups == 1 || groups == kv_heads, "state.gate has shape ", state.gate.sym_sizes(), " and so ", groups,
                    " gate groups; with ", kv_heads, " KV heads 1 (shared) or ", kv_heads, " (per head) are supported");
  TORCH_CHECK_VALUE(groups == 1 || m.policy == Policy::kRetention,
                    "policy='novelty_lru' routes tokens for all KV heads together and needs a shared gate; the state has ",
                    groups, " gate groups");
  TORCH_CHECK_VALUE(groups == 1 || summary == 0, summary, " summary slots route tokens for all KV heads together and need a ",
                    "shared gate; the state has ", groups, " gate groups");
  TORCH_CHECK_VALUE(exact >= m.num_sinks, "num_sinks=", m.num_sinks, " needs as many exact slots, but the state has ", exact,
                    "; lower num_sinks or give the state more");
  for (const auto& [name, t] : {std::pair{"state.gate", state.gate}, std::pair{"state.summary_k", state.summary_k},
                                std::pair{"state.summary_v", state.summary_v},
                                std::pair{"state.summary_mass", state.summary_mass}}) {
    expect_dtype(name, t, wide(k));
  }
  for (const auto& [name, t] : {std::pair{"state.exact_pos", state.exact_pos}, std::pair{"state.tokens_seen", state.tokens_seen},
                                std::pair{"state.last_touch", state.last_touch}, std::pair{"state.counts", state.counts}}) {
    expect_dtype(name, t, at::kLong);
  }
  expect_shape("state.gate", state.gate, "(N, R, W + Me)", {sequences, groups, slots});
  expect_shape("state.exact_pos", state.exact_pos, "(N, R, Me)", {sequences, groups, exact});
  expect_shape("state.tokens_seen", state.tokens_seen, "(N)", {sequences});
  if (m.policy == Policy::kNoveltyLru) {
    expect_shape("state.last_touch", state.last_touch, "(N, Me) with policy='novelty_lru'", {sequences, exact});
  } else {
    expect_shape("state.last_touch", state.last_touch, "(N, 0) with policy='retention'", {sequences, 0});
  }
  expect_shape("state.counts", state.counts, "(N, 2)", {sequences, 2});
  expect_shape("state.summary_k", state.summary_k, "(N, Hkv, Ms, D)", {sequences, kv_heads, summary, dim});
  expect_shape("state.summary_v", state.summary_v, "(N, Hkv, Ms, D)", {sequences, kv_heads, summary, dim});
  expect_shape("state.summary_mass", state.summary_mass, "(N, Ms)", {sequences, summary});
}

// Gate logits beside a checked state.
void check_gate(const at::Tensor& gate, const at::Tensor& k, at::TensorList tensors) {
  const auto groups = State::from_tensors(tensors).gate.sym_size(1);
  const auto tokens = k.sym_sizes().slice(0, k.dim() - 2);
  TORCH_CHECK_VALUE(gate.dim() == k.dim() - 1 && gate.sym_sizes().slice(0, tokens.size()) == tokens &&
                        gate.sym_size(-1) == groups,
                    "gate has shape ", gate.sym_sizes(), " but k has shape ", k.sym_sizes(), " and the state has ", groups,
                    " gate groups; gate is one logit per token and gate group");
  expect_floating("gate", gate);
  expect_device("gate", gate, "k", k);
}

void check_eta(const std::optional<at::Tensor>& eta_logit, const at::Tensor& k, at::TensorList tensors) {
  const auto summary = State::from_tensors(tensors).summary_mass.sym_size(1);
  TORCH_CHECK_VALUE(eta_logit || summary == 0, "the state has ", summary,
                    " summary slots but eta_logit is missing; give one logit per KV head, (Hkv)");
  if (!eta_logit) return;
  expect_floating("eta_logit", *eta_logit);
  expect_shape("eta_logit", *eta_logit, "(Hkv)", {k.sym_size(-2)});
  expect_device("eta_logit", *eta_logit, "k", k);
}

// What all memory ops have in common, beside checked keys.
void check_memory_inputs(const at::Tensor& gate, at::TensorList state, const c10::SymInt& sequences, const at::Tensor& k,
                         const at::Tensor& inv_freq, const MemoryOptions& memory) {
  check_memory(memory);
  check_state(state, sequences, k, memory);
  check_gate(gate, k, state);
  check_inv_freq(inv_freq, "k", k);
}

}  // namespace

void check_apply_rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& inv_freq) {
  TORCH_CHECK_VALUE(x.dim() >= 2, "x has shape ", x.sym_sizes(), "; apply_rope takes (..., heads, D)");
  check_head_dim("x", x);
  expect_floating("x", x);
  expect_dtype("positions", positions, at::kLong);
  TORCH_CHECK_VALUE(positions.sym_sizes() == x.sym_sizes().slice(0, x.dim() - 2), "positions has shape ",
                    positions.sym_sizes(), " but x has shape ", x.sym_sizes(),
                    "; positions is one number per token, x's shape without heads and D");
  expect_device("positions", positions, "x", x);
  check_inv_freq(inv_freq, "x", x);
}

void check_diff_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                          const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& cu_seqlens_q,
                          const std::optional<at::Tensor>& cu_seqlens_k) {
  TORCH_CHECK_VALUE(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k",
                    " is given without ", cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
                    "; give both for packed sequences or neither for a dense batch");
  if (cu_seqlens_q) {
    check_keys(k, v, 3, "packed (Tk, Hkv, D) with cu_seqlens and dense (B, Lk, Hkv, D) without, so packed");
    check_queries(q, k);
    check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, k);
    check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, k);
    TORCH_CHECK_VALUE(cu_seqlens_q->sym_size(0) == cu_seqlens_k->sym_size(0), "cu_seqlens_q has shape ",
                      cu_seqlens_q->sym_sizes(), " but cu_seqlens_k has shape ", cu_seqlens_k->sym_sizes(),
                      "; both name the ends of the same sequences");
  } else {
    check_keys(k, v, 4, "packed (Tk, Hkv, D) with cu_seqlens and dense (B, Lk, Hkv, D) without, so dense");
    check_queries(q, k);
    TORCH_CHECK_VALUE(q.sym_size(0) >= 1, "q has shape ", q.sym_sizes(), ", an empty batch; give at least one sequence");
    TORCH_CHECK_VALUE(q.sym_size(0) == k.sym_size(0), "q has shape ", q.sym_sizes(), " but k has shape ", k.sym_sizes(),
                      "; both need the same batch");
  }
  check_head_parameters(q, lam, theta, norm_weight);
}

void check_route_exact_bank(const at::Tensor& value, const at::Tensor& gate, const at::Tensor& position,
                            const at::Tensor& bank_value, const at::Tensor& used, const at::Tensor& last_touch,
                            int64_t num_sinks) {
  TORCH_CHECK_VALUE(value.dim() == 4 && bank_value.dim() == 4, "value has shape ", value.sym_sizes(), " and bank_value ",
                    bank_value.sym_sizes(), "; they are (B, Hkv, T, D) and (B, Hkv, Me, D)");
  const auto batch = value.sym_size(0), tokens = value.sym_size(2), slots = bank_value.sym_size(2);
  TORCH_CHECK_VALUE(batch >= 1, "value has shape ", value.sym_sizes(), ", an empty batch; give at least one sequence");
  TORCH_CHECK_VALUE(value.sym_size(1) >= 1 && value.sym_size(3) >= 1 && value.sym_size(3) <= kMaxHeadDim, "value has shape ",
                    value.sym_sizes(), "; at least one KV head and a head_dim of 1 to ", kMaxHeadDim, " are supported");
  expect_floating("value", value);
  expect_shape("bank_value", bank_value, "(B, Hkv, Me, D)", {batch, value.sym_size(1), slots, value.sym_size(3)});
  TORCH_CHECK_VALUE(bank_value.scalar_type() == value.scalar_type(), "bank_value is of ", bank_value.scalar_type(),
                    " but value is of ", value.scalar_type(), "; convert one of them");
  expect_floating("gate", gate);
  expect_shape("gate", gate, "(B, T)", {batch, tokens});
  expect_dtype("position", position, at::kLong);
  expect_shape("position", position, "(B, T)", {batch, tokens});
  expect_dtype("used", used, at::kBool);
  expect_shape("used", used, "(B, Me)", {batch, slots});
  expect_dtype("last_touch", last_touch, at::kLong);
  expect_shape("last_touch", last_touch, "(B, Me)", {batch, slots});
  expect_device("gate", gate, "value", value);
  expect_device("position", position, "value", value);
  expect_device("bank_value", bank_value, "value", value);
  expect_device("used", used, "value", value);
  expect_device("last_touch", last_touch, "value", value);
  TORCH_CHECK_VALUE(num_sinks >= 0 && slots >= num_sinks, "num_sinks=", num_sinks, " is not supported with ", slots,
                    " exact slots; it is a number of slots from 0 to all of them");
}

void check_bank_scan(const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate, const at::Tensor& cu_seqlens,
                     at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                     const MemoryOptions& memory) {
  check_keys(k, v, 3, "packed (T, Hkv, D)");
  check_memory_inputs(gate, state, check_sequences(cu_seqlens, k, state), k, inv_freq, memory);
  expect_dtype("gate", gate, wide(k));
  check_eta(eta_logit, k, state);
}

void check_bounded_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                             const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                             const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index,
                             const at::Tensor& summary_k, const at::Tensor& summary_v, const at::Tensor& summary_mass,
                             const at::Tensor& inv_freq, const MemoryOptions& memory) {
  check_keys(k, v, 3, "packed (T, Hkv, D)");
  check_queries(q, k);
  check_same_tokens(q, k);
  check_head_parameters(q, lam, theta, norm_weight);
  const auto sequences = check_sequences(cu_seqlens, k, state);
  check_memory_inputs(gate, state, sequences, k, inv_freq, memory);
  expect_dtype("gate", gate, wide(k));
  const auto held = State::from_tensors(state);
  const auto rows = k.sym_size(0) / memory.chunk + sequences * 2, summary = held.summary_mass.sym_size(1);
  expect_dtype("index", index, at::kInt);
  expect_shape("index", index, "(T / C + 2 N, R, Me)", {rows, held.gate.sym_size(1), held.exact_pos.sym_size(2)});
  expect_shape("summary_k", summary_k, "(T / C + 2 N, Hkv, Ms, D)", {rows, k.sym_size(1), summary, k.sym_size(2)});
  expect_shape("summary_v", summary_v, "(T / C + 2 N, Hkv, Ms, D)", {rows, k.sym_size(1), summary, k.sym_size(2)});
  expect_shape("summary_mass", summary_mass, "(T / C + 2 N, Ms)", {rows, summary});
  for (const auto& [name, t] : {std::pair{"summary_k", summary_k}, std::pair{"summary_v", summary_v},
                                std::pair{"summary_mass", summary_mass}}) {
    expect_dtype(name, t, wide(k));
    expect_device(name, t, "k", k);
  }
  expect_device("index", index, "k", k);
}

void check_bounded_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                           const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
                           const std::optional<at::Tensor>& cu_seqlens, at::TensorList state,
                           const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
                           const MemoryOptions& memory, int64_t segment) {
  if (cu_seqlens) {
    check_keys(k, v, 3, "packed (T, Hkv, D) with cu_seqlens and dense (B, L, Hkv, D) without, so packed");
    check_cu_seqlens("cu_seqlens", *cu_seqlens, k);
  } else {
    check_keys(k, v, 4, "packed (T, Hkv, D) with cu_seqlens and dense (B, L, Hkv, D) without, so dense");
    TORCH_CHECK_VALUE(k.sym_size(0) >= 1, "k has shape ", k.sym_sizes(), ", an empty batch; give at least one sequence");
  }
  check_queries(q, k);
  check_same_tokens(q, k);
  check_head_parameters(q, lam, theta, norm_weight);
  check_memory_inputs(gate, state, cu_seqlens ? cu_seqlens->sym_size(0) - 1 : k.sym_size(0), k, inv_freq, memory);
  check_eta(eta_logit, k, state);
  TORCH_CHECK_VALUE(segment >= 1, "segment=", segment, " is not supported; it is a number of tokens >= 1");
}

void check_decode_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
                       const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight,
                       const at::Tensor& gate, at::TensorList state, const std::optional<at::Tensor>& eta_logit,
                       const at::Tensor& inv_freq, const MemoryOptions& memory) {
  check_keys(k, v, 3, "(N, Hkv, D), one token per sequence,");
  check_queries(q, k);
  check_same_tokens(q, k);
  TORCH_CHECK_VALUE(k.sym_size(0) >= 1, "k has shape ", k.sym_sizes(), ", an empty batch; give at least one sequence");
  check_head_parameters(q, lam, theta, norm_weight);
  check_memory_inputs(gate, state, k.sym_size(0), k, inv_freq, memory);
  expect_dtype("gate", gate, wide(k));
  check_eta(eta_logit, k, state);
  for (const auto& t : state) {
    TORCH_CHECK_VALUE(t.is_contiguous(), "a tensor of the state has shape ", t.sym_sizes(), " and strides ", t.sym_strides(),
                      "; decode_step_ writes it in place and needs it contiguous");
  }
}

}  // namespace coda
