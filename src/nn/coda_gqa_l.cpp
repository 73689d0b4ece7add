#include <coda/nn/coda_gqa_l.h>

#include <cmath>
#include <numbers>

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/init.h>
#include <torch/types.h>

#include <coda/ops/apply_rope.h>
#include <coda/ops/bounded.h>
#include <coda/ops/diff_attention.h>

namespace coda {

Gates parse_gates(const std::string& name) {
  if (name == "per_head") return Gates::kPerHead;
  if (name == "shared") return Gates::kShared;
  TORCH_CHECK_VALUE(false, "gates '", name, "' is not supported; choose 'per_head' or 'shared'");
}

std::string to_string(Gates gates) { return gates == Gates::kPerHead ? "per_head" : "shared"; }

HeadNorm parse_head_norm(const std::string& name) {
  if (name == "identity") return HeadNorm::kIdentity;
  if (name == "rms") return HeadNorm::kRms;
  TORCH_CHECK_VALUE(false, "head_norm '", name, "' is not supported; choose 'identity' or 'rms'");
}

std::string to_string(HeadNorm norm) { return norm == HeadNorm::kIdentity ? "identity" : "rms"; }

CodaGqaLOptions::CodaGqaLOptions(int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads)
    : embed_dim_(embed_dim), num_heads_(num_heads), num_kv_heads_(num_kv_heads) {}

void CodaGqaLOptions::validate() {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    TORCH_CHECK_VALUE(value >= least, name, "=", value, " is not supported; it must be an integer of at least ", least);
  };
  at_least("embed_dim", embed_dim_, 1);
  at_least("num_heads", num_heads_, 1);
  at_least("num_kv_heads", num_kv_heads_, 1);
  at_least("head_dim", head_dim_, 0);
  at_least("window", window_, 1);
  at_least("chunk", chunk_, 1);
  at_least("exact_slots", exact_slots_, 0);
  at_least("summary_slots", summary_slots_, 0);
  at_least("num_sinks", num_sinks_, 0);
  at_least("exact_candidates", exact_candidates_, 0);
  TORCH_CHECK_VALUE(num_heads_ % num_kv_heads_ == 0, "num_kv_heads=", num_kv_heads_, " does not divide num_heads=", num_heads_,
                    "; every KV head serves the same number of query heads");
  if (head_dim_ == 0) {
    TORCH_CHECK_VALUE(embed_dim_ % num_heads_ == 0, "num_heads=", num_heads_, " does not divide embed_dim=", embed_dim_,
                      "; choose another number of heads or give head_dim");
    head_dim_ = embed_dim_ / num_heads_;
  }
  TORCH_CHECK_VALUE(head_dim_ % 2 == 0, "head_dim=", head_dim_, " is not supported; rotary embeddings need an even head_dim");
  TORCH_CHECK_VALUE(head_dim_ <= 256, "head_dim=", head_dim_, " is not supported; it may be at most 256");
  TORCH_CHECK_VALUE(rope_base_ > 0.0, "rope_base=", rope_base_, " is not supported; it must be positive");
  TORCH_CHECK_VALUE(window_ % chunk_ == 0, "chunk=", chunk_, " does not divide window=", window_,
                    "; choose a chunk that divides the window");
  TORCH_CHECK_VALUE(num_sinks_ <= exact_slots_, "num_sinks=", num_sinks_, " needs as many exact slots, but exact_slots=",
                    exact_slots_, "; lower num_sinks or raise exact_slots");
  TORCH_CHECK_VALUE(gates_ == Gates::kShared || policy_ == Policy::kRetention,
                    "policy='novelty_lru' routes tokens for all KV heads together and needs gates='shared'; got gates='per_head'");
  TORCH_CHECK_VALUE(gates_ == Gates::kShared || summary_slots_ == 0, "summary_slots=", summary_slots_,
                    " routes tokens for all KV heads together and needs gates='shared'; got gates='per_head'");
  TORCH_CHECK_VALUE(!bank_distance_ || *bank_distance_ >= 0, "bank_distance=", bank_distance_.value_or(0),
                    " is not supported; it is a number of tokens >= 0, or none for true positions");
  for (const auto& [name, tau] : {std::pair{"tau_exact", tau_exact_}, std::pair{"tau_summary", tau_summary_}}) {
    TORCH_CHECK_VALUE(tau >= 0.0 && tau < 1.0, name, "=", tau, " is not supported; a gate threshold lies in [0, 1)");
  }
  TORCH_CHECK_VALUE(age_decay_ >= 0.0, "age_decay=", age_decay_, " is not supported; it is a rate per token >= 0");
}

int64_t CodaGqaLOptions::gate_groups() const { return gates_ == Gates::kPerHead ? num_kv_heads_ : 1; }

MemoryOptions CodaGqaLOptions::memory() const {
  return {.window = window_,
          .chunk = chunk_,
          .policy = policy_,
          .num_sinks = num_sinks_,
          .age_decay = age_decay_,
          .bank_distance = bank_distance_,
          .gate_bias = gate_bias_.value_or(policy_ == Policy::kRetention),
          .mass_bias = mass_bias_,
          .exact_candidates = exact_candidates_,
          .tau_exact = tau_exact_,
          .tau_summary = tau_summary_,
          .tau_novel = tau_novel_,
          .tau_match = tau_match_,
          .tau_spawn = tau_spawn_,
          .refresh_on_hit = refresh_on_hit_,
          .summary_routing = summary_routing_,
          .rope_pairs = rope_pairs_};
}

AttentionOptions CodaGqaLOptions::attention() const {
  return {.scale = std::nullopt, .theta_pairs = theta_pairs_, .norm_eps = norm_eps_};
}

State make_state(const CodaGqaLOptions& o, int64_t sequences, const at::TensorOptions& kv_options) {
  return make_state(sequences, o.num_kv_heads(), o.head_dim(), o.window(), o.exact_slots(), o.summary_slots(), o.gate_groups(),
                    o.policy() == Policy::kNoveltyLru, kv_options);
}

namespace {

at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// --- checks -------------------------------------------------------------------------------------------------------------

void check_input(const CodaGqaLOptions& options, const CodaGqaLWeights& weights, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == options.embed_dim(), "x has shape ", x.sizes(),
                    "; the layer takes (batch, tokens, embed_dim) with embed_dim=", options.embed_dim());
  TORCH_CHECK_VALUE(x.size(0) > 0, "x has shape ", x.sizes(), ", an empty batch; give at least one sequence");
  TORCH_CHECK_VALUE(at::isFloatingType(x.scalar_type()), "x is of ", x.scalar_type(),
                    "; the layer takes floating-point embeddings");
  const auto& own = weights.q.weight;
  TORCH_CHECK_VALUE(x.device() == own.device(), "x is on ", x.device(), " but the layer's parameters are on ", own.device(),
                    "; move one of them");
  TORCH_CHECK_VALUE(x.scalar_type() == own.scalar_type() || at::autocast::is_autocast_enabled(x.device().type()), "x is of ",
                    x.scalar_type(), " but the layer's parameters are of ", own.scalar_type(), "; convert one of them");
}

// What a configuration leaves in the shapes of a state.
struct Layout {
  int64_t num_kv_heads, head_dim, window, exact_slots, summary_slots, gate_groups, touch_slots;
  bool operator==(const Layout&) const = default;
};

std::ostream& operator<<(std::ostream& stream, const Layout& l) {
  return stream << "num_kv_heads=" << l.num_kv_heads << ", head_dim=" << l.head_dim << ", window=" << l.window
                << ", exact_slots=" << l.exact_slots << ", summary_slots=" << l.summary_slots
                << ", gate groups=" << l.gate_groups << ", last-touch times=" << l.touch_slots;
}

void check_state(const CodaGqaLOptions& o, const State& state, const at::Tensor& x, at::ScalarType kv_dtype) {
  TORCH_CHECK_VALUE(state.k.defined() && state.k.dim() == 4 && state.gate.dim() == 3 && state.exact_pos.dim() == 3 &&
                        state.last_touch.dim() == 2 && state.summary_mass.dim() == 2,
                    "this state was not made by make_state; start from layer.make_state(batch_size)");
  const int64_t exact = state.exact_pos.size(2);
  const Layout held{state.k.size(1),          state.k.size(3),    state.k.size(2) - exact, exact,
                    state.summary_mass.size(1), state.gate.size(1), state.last_touch.size(1)};
  const Layout own{o.num_kv_heads(),  o.head_dim(),    o.window(), o.exact_slots(),
                   o.summary_slots(), o.gate_groups(), o.policy() == Policy::kNoveltyLru ? o.exact_slots() : 0};
  TORCH_CHECK_VALUE(held == own, "the state was made by another configuration: ", held, "; this layer has ", own,
                    ". Use a state with the layer that made it");
  TORCH_CHECK_VALUE(state.k.size(0) == x.size(0), "the state holds ", state.k.size(0), " sequences but x has ", x.size(0),
                    "; use a state with the batch that it was made for");
  TORCH_CHECK_VALUE(state.k.device() == x.device(), "the state is on ", state.k.device(), " but x is on ", x.device(),
                    "; make the state on the device of x");
  TORCH_CHECK_VALUE(state.k.scalar_type() == kv_dtype, "the state is of ", state.k.scalar_type(),
                    " but the layer's keys and values are of ", kv_dtype, "; make the state with that dtype");
}

// --- projections --------------------------------------------------------------------------------------------------------

at::Tensor linear(const at::Tensor& x, const CodaGqaLWeights::Projection& projection) {
  return at::linear(x, projection.weight, projection.bias);
}

// x (..., E) times weight (G, E) transposed, both float16 or bfloat16 on a GPU, in float32 as its tensor cores sum it. at::mm has
// this product but no derivative of it.
struct WideProduct : torch::autograd::Function<WideProduct> {
  static at::Tensor rows(const at::Tensor& t) { return t.reshape({-1, t.size(-1)}); }

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight) {
    ctx->save_for_backward({x, weight});
    auto shape = x.sizes().vec();
    shape.back() = weight.size(0);
    return at::mm(rows(x), weight.t(), at::kFloat).view(shape);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto grad = grads[0].to(saved[0].scalar_type());
    return {at::matmul(grad, saved[1]), at::mm(rows(grad).t(), rows(saved[0]))};
  }
};

// Gate logits in float32: in bfloat16 they would be coarser than the age decay.
at::Tensor gate_logits(const at::Tensor& x, const CodaGqaLWeights::Projection& write) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = wide(x.scalar_type());
  if (x.is_cuda() && x.scalar_type() == write.weight.scalar_type() && x.scalar_type() != dtype) {
    return WideProduct::apply(x, write.weight) + *write.bias;
  }
  return at::linear(x.to(dtype), write.weight.to(dtype), write.bias->to(dtype));
}

// x (B, L, E) as the tensors to be projected one by one. On the CPU those are single sequences in storage of their own: the
// GEMM there sums in an order that changes with the number of rows and with the alignment of its input, and the vectorized
// functions differ from their scalar tail, so a row of a batch would otherwise depend on the rows beside it.
std::vector<at::Tensor> independent_rows(const at::Tensor& x) {
  if (!x.is_cpu()) return {x};
  auto rows = x.split(1);
  for (auto& row : rows) row = row.clone(at::MemoryFormat::Contiguous);
  return rows;
}

at::Tensor join(std::vector<at::Tensor> rows) { return rows.size() == 1 ? rows[0] : at::cat(rows); }

// What attention reads of the new tokens.
struct Projected {
  at::Tensor q;                   // (B, L, H, D), rotated
  at::Tensor k, v;                // (B, L, Hkv, D), k rotated
  std::optional<at::Tensor> lam;  // (B, L, H)
};

Projected project_rows(const CodaGqaLOptions& o, const CodaGqaLWeights& w, const at::Tensor& x, const at::Tensor& positions,
                       const at::Tensor& inv_freq) {
  const auto heads = [&](const CodaGqaLWeights::Projection& projection) {
    return linear(x, projection).unflatten(-1, {-1, o.head_dim()});
  };
  Projected p{apply_rope(heads(w.q), positions, inv_freq, 1.0, o.rope_pairs()),
              apply_rope(heads(w.k), positions, inv_freq, 1.0, o.rope_pairs()), heads(w.v), std::nullopt};
  if (w.lambda) p.lam = linear(x, *w.lambda).sigmoid();
  return p;
}

// positions (B, L).
Projected project(const CodaGqaLOptions& o, const CodaGqaLWeights& w, const std::vector<at::Tensor>& rows,
                  const at::Tensor& positions, const at::Tensor& inv_freq) {
  std::vector<at::Tensor> q, k, v, lam;
  int64_t first = 0;
  for (const auto& row : rows) {
    auto p = project_rows(o, w, row, positions.narrow(0, first, row.size(0)), inv_freq);
    first += row.size(0);
    q.push_back(std::move(p.q));
    k.push_back(std::move(p.k));
    v.push_back(std::move(p.v));
    if (p.lam) lam.push_back(std::move(*p.lam));
  }
  return {join(std::move(q)), join(std::move(k)), join(std::move(v)),
          lam.empty() ? std::nullopt : std::optional(join(std::move(lam)))};
}

at::Tensor project_gate(const CodaGqaLWeights& w, const std::vector<at::Tensor>& rows) {
  std::vector<at::Tensor> gates;
  for (const auto& row : rows) gates.push_back(gate_logits(row, w.write));
  return join(std::move(gates));
}

// y (B, L, H, D) to (B, L, E).
at::Tensor project_output(const CodaGqaLWeights& w, const at::Tensor& y) {
  auto rows = independent_rows(y.flatten(-2));
  for (auto& row : rows) row = linear(row, w.o);
  return join(std::move(rows));
}

at::Tensor rope_inv_freq(const CodaGqaLOptions& o, const at::Device& device) {
  const auto exponent = at::arange(0, o.head_dim(), 2, at::TensorOptions().dtype(at::kDouble).device(device));
  return at::pow(o.rope_base(), exponent / -static_cast<double>(o.head_dim()));
}

std::optional<at::Tensor> like(const std::optional<at::Tensor>& t, const at::Tensor& q) {
  return t ? std::optional(t->to(q.scalar_type())) : std::nullopt;
}

bool autograd_records(const CodaGqaLWeights& w, const at::Tensor& x, const State& state) {
  if (!at::GradMode::is_enabled()) return false;
  bool records = x.requires_grad();
  const auto see = [&](const std::optional<at::Tensor>& t) { records |= t && t->requires_grad(); };
  for (const auto* p : {&w.q, &w.k, &w.v, &w.o, &w.write}) see(p->weight), see(p->bias);
  if (w.lambda) see(w.lambda->weight), see(w.lambda->bias);
  see(w.theta), see(w.summary_eta_logit), see(w.norm_weight);
  for (const auto& t : state.tensors()) see(t);
  return records;
}

}  // namespace

at::Tensor coda_gqa_l(const CodaGqaLOptions& options, const CodaGqaLWeights& weights, const at::Tensor& x) {
  check_input(options, weights, x);
  if (x.size(1) == 0) return at::empty_like(x);
  const auto positions = at::arange(x.size(1), x.options().dtype(at::kLong)).expand({x.size(0), -1});
  const auto p = project(options, weights, independent_rows(x), positions, rope_inv_freq(options, x.device()));
  const auto y = diff_attention(p.q, p.k, p.v, p.lam, like(weights.theta, p.q), like(weights.norm_weight, p.q), std::nullopt,
                                std::nullopt, true, options.attention());
  return project_output(weights, y);
}

at::Tensor coda_gqa_l_bounded(const CodaGqaLOptions& options, const CodaGqaLWeights& weights, const at::Tensor& x,
                              State& state) {
  check_input(options, weights, x);
  const auto device = x.device().type();
  const bool autocast = at::autocast::is_autocast_enabled(device) && x.scalar_type() != at::kDouble;
  check_state(options, state, x, autocast ? at::autocast::get_autocast_dtype(device) : x.scalar_type());
  if (x.size(1) == 0) return at::empty_like(x);

  const auto rows = independent_rows(x);
  const auto inv_freq = rope_inv_freq(options, x.device());
  const auto positions = state.tokens_seen.unsqueeze(1) + at::arange(x.size(1), state.tokens_seen.options());
  const auto p = project(options, weights, rows, positions, inv_freq);
  const auto gate = project_gate(weights, rows);
  const auto theta = like(weights.theta, p.q), norm_weight = like(weights.norm_weight, p.q);
  const auto eta_logit = options.summary_slots() ? weights.summary_eta_logit : std::nullopt;

  if (autograd_records(weights, x, state)) {
    auto [y, next] = bounded_forward(p.q, p.k, p.v, p.lam, theta, norm_weight, gate, std::nullopt, state, eta_logit, inv_freq,
                                     options.memory(), options.attention());
    auto out = project_output(weights, y);
    state = std::move(next);
    return out;
  }
  const at::NoGradGuard no_grad;
  if (x.size(1) == 1) {
    const auto lam = p.lam ? std::optional(p.lam->squeeze(1)) : std::nullopt;
    const auto y = decode_step_(p.q.squeeze(1), p.k.squeeze(1), p.v.squeeze(1), lam, theta, norm_weight, gate.squeeze(1),
                                state, eta_logit, inv_freq, options.memory(), options.attention());
    return project_output(weights, y.unsqueeze(1));
  }
  const auto [y, next] = bounded_forward(p.q, p.k, p.v, p.lam, theta, norm_weight, gate, std::nullopt, state, eta_logit,
                                         inv_freq, options.memory(), options.attention());
  auto out = project_output(weights, y);
  const auto held = state.tensors(), read = next.tensors();
  for (size_t i = 0; i < held.size(); ++i) held[i].copy_(read[i]);
  return out;
}

// --- the module ---------------------------------------------------------------------------------------------------------

HeadRmsNormImpl::HeadRmsNormImpl(int64_t head_dim) : head_dim_(head_dim) { reset(); }

void HeadRmsNormImpl::reset() { weight = register_parameter("weight", torch::ones({head_dim_})); }

CodaGqaLImpl::CodaGqaLImpl(int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads)
    : CodaGqaLImpl(CodaGqaLOptions(embed_dim, num_heads, num_kv_heads)) {}

CodaGqaLImpl::CodaGqaLImpl(const CodaGqaLOptions& options_) : options(options_) {
  options.validate();
  reset();
}

void CodaGqaLImpl::reset() {
  const int64_t embed = options.embed_dim(), heads = options.num_heads(), hkv = options.num_kv_heads();
  const auto linear = [](int64_t in, int64_t out, bool bias) {
    return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias));
  };
  q_proj = register_module("q_proj", linear(embed, heads * options.head_dim(), options.bias()));
  k_proj = register_module("k_proj", linear(embed, hkv * options.head_dim(), options.bias()));
  v_proj = register_module("v_proj", linear(embed, hkv * options.head_dim(), options.bias()));
  o_proj = register_module("o_proj", linear(heads * options.head_dim(), embed, options.bias()));
  if (options.differential()) {
    lambda_proj = register_module("lambda_proj", linear(embed, heads, true));
    theta = register_parameter("theta", torch::empty({heads, options.head_dim() / 2}));
  }
  write_proj = register_module("write_proj", linear(embed, options.gate_groups(), true));
  // Present without summary slots too, as in the checkpoints.
  summary_eta_logit = register_parameter("summary_eta_logit", torch::empty({hkv}));
  if (options.head_norm() == HeadNorm::kRms) head_norm = register_module("head_norm", HeadRmsNorm(options.head_dim()));
  reset_parameters();
}

void CodaGqaLImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  for (auto* projection : {&q_proj, &k_proj, &v_proj, &o_proj}) (*projection)->reset_parameters();
  if (options.differential()) {
    lambda_proj->reset_parameters();
    lambda_proj->bias.fill_(-6.0);
    theta.fill_(std::numbers::pi / 2);
  }
  write_proj->weight.zero_();
  write_proj->bias.fill_(options.policy() == Policy::kRetention ? 0.0 : -2.0);
  summary_eta_logit.fill_(-3.0);
  if (head_norm) head_norm->weight.fill_(1.0);
}

void CodaGqaLImpl::pretty_print(std::ostream& stream) const {
  const auto& o = options;
  stream << "coda::CodaGqaL(embed_dim=" << o.embed_dim() << ", num_heads=" << o.num_heads()
         << ", num_kv_heads=" << o.num_kv_heads() << ", window=" << o.window() << ", chunk=" << o.chunk()
         << ", exact_slots=" << o.exact_slots() << ", summary_slots=" << o.summary_slots()
         << ", policy=" << to_string(o.policy()) << ", gates=" << to_string(o.gates()) << ")";
}

CodaGqaLWeights CodaGqaLImpl::weights() const {
  const auto optional = [](const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; };
  const auto projection = [&](const torch::nn::Linear& m) {
    return CodaGqaLWeights::Projection{m->weight, optional(m->bias)};
  };
  return {.q = projection(q_proj),
          .k = projection(k_proj),
          .v = projection(v_proj),
          .o = projection(o_proj),
          .lambda = lambda_proj ? std::optional(projection(lambda_proj)) : std::nullopt,
          .write = projection(write_proj),
          .theta = optional(theta),
          .summary_eta_logit = summary_eta_logit,
          .norm_weight = head_norm ? std::optional(head_norm->weight) : std::nullopt};
}

at::Tensor CodaGqaLImpl::forward(const at::Tensor& x) { return coda_gqa_l(options, weights(), x); }

at::Tensor CodaGqaLImpl::forward_bounded(const at::Tensor& x, State& state) {
  return coda_gqa_l_bounded(options, weights(), x, state);
}

State CodaGqaLImpl::make_state(int64_t batch_size, const at::TensorOptions& kv_options) const {
  return coda::make_state(options, batch_size, kv_options);
}

int64_t CodaGqaLImpl::state_bytes(int64_t batch_size, at::ScalarType dtype) const {
  return make_state(batch_size, at::TensorOptions().dtype(dtype).device(at::kMeta)).nbytes();
}

}  // namespace coda
