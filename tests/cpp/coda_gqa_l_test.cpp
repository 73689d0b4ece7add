#include <cmath>
#include <functional>
#include <map>
#include <sstream>
#include <string>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <coda/coda.h>

namespace {

using coda::CodaGqaL;
using coda::CodaGqaLOptions;

constexpr int64_t kEmbed = 12;

// D 6, H 4, Hkv 2; ring of 8, chunks of 4, 5 exact slots of which 2 are sinks.
CodaGqaLOptions small_options() {
  return CodaGqaLOptions(kEmbed, 4, 2).head_dim(6).window(8).chunk(4).exact_slots(5).num_sinks(2).bank_distance(16);
}

CodaGqaLOptions paper_options() {
  return small_options()
      .policy(coda::Policy::kNoveltyLru)
      .gates(coda::Gates::kShared)
      .num_sinks(0)
      .summary_slots(3)
      .bank_distance(std::nullopt)
      .gate_bias(true)
      .head_norm(coda::HeadNorm::kRms);
}

// A double-precision layer whose lambda, theta and gate all matter.
CodaGqaL make_layer(const CodaGqaLOptions& options) {
  torch::manual_seed(7);
  CodaGqaL layer(options);
  layer->to(torch::kDouble);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : layer->parameters()) parameter.normal_(0.0, 0.4);
  return layer;
}

torch::Tensor tokens(int64_t batch, int64_t length) {
  torch::manual_seed(11);
  return torch::randn({batch, length, kEmbed}, torch::kDouble);
}

torch::Tensor read_in_pieces(CodaGqaL& layer, const torch::Tensor& x, std::vector<int64_t> sizes, coda::State& state) {
  std::vector<torch::Tensor> outputs;
  for (const auto& piece : x.split_with_sizes(sizes, 1)) outputs.push_back(layer->forward_bounded(piece, state));
  return torch::cat(outputs, 1);
}

std::map<std::string, std::vector<int64_t>> shapes(const CodaGqaL& layer) {
  std::map<std::string, std::vector<int64_t>> result;
  for (const auto& item : layer->named_parameters()) result[item.key()] = item.value().sizes().vec();
  return result;
}

void expect_part(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text << "\n  does not contain: " << part;
}

void expect_error(const std::function<void()>& action, const std::string& part) {
  try {
    action();
    ADD_FAILURE() << "no error; expected one with: " << part;
  } catch (const c10::Error& error) {
    expect_part(error.what_without_backtrace(), part);
  }
}

// The gradient of every parameter and of x along a random direction, against central differences.
void check_gradients(CodaGqaL& layer, const std::function<torch::Tensor(const torch::Tensor&)>& function, bool bounded) {
  auto x = tokens(2, 21).requires_grad_();
  const auto weight = torch::randn({2, 21, kEmbed}, torch::kDouble);
  const auto loss = [&] { return (function(x) * weight).sum(); };
  loss().backward();
  auto inputs = layer->named_parameters();
  inputs.insert("x", x);
  for (auto& item : inputs) {
    const bool used = bounded ? layer->options.summary_slots() || item.key() != "summary_eta_logit"
                              : item.key() != "summary_eta_logit" && !item.key().starts_with("write_proj");
    ASSERT_EQ(item.value().grad().defined(), used) << item.key();
    if (!used) continue;
    const torch::NoGradGuard no_grad;
    auto& value = item.value();
    const auto direction = torch::randn_like(value);
    const double step = 1e-6;
    value.add_(direction, step);
    const double above = loss().item<double>();
    value.sub_(direction, 2 * step);
    const double below = loss().item<double>();
    value.add_(direction, step);
    const double numeric = (above - below) / (2 * step), analytic = (value.grad() * direction).sum().item<double>();
    EXPECT_NEAR(analytic, numeric, 1e-5 * (1 + std::abs(numeric))) << item.key();
    EXPECT_NE(analytic, 0.0) << item.key();
  }
}

TEST(CodaGqaLTest, ParametersHaveTheNamesOfTheCheckpoints) {
  const std::map<std::string, std::vector<int64_t>> core{
      {"q_proj.weight", {24, 12}},    {"k_proj.weight", {12, 12}},  {"v_proj.weight", {12, 12}}, {"o_proj.weight", {12, 24}},
      {"summary_eta_logit", {2}}};
  auto per_head = core;
  per_head.insert({{"lambda_proj.weight", {4, 12}}, {"lambda_proj.bias", {4}}, {"theta", {4, 3}},
                   {"write_proj.weight", {2, 12}}, {"write_proj.bias", {2}}});
  EXPECT_EQ(shapes(CodaGqaL(small_options())), per_head);

  auto paper = per_head;
  paper["write_proj.weight"] = {1, 12};
  paper["write_proj.bias"] = {1};
  paper["head_norm.weight"] = {6};
  EXPECT_EQ(shapes(CodaGqaL(paper_options())), paper);

  auto plain = core;
  plain.insert({{"write_proj.weight", {2, 12}}, {"write_proj.bias", {2}}, {"q_proj.bias", {24}}, {"k_proj.bias", {12}},
                {"v_proj.bias", {12}}, {"o_proj.bias", {12}}});
  EXPECT_EQ(shapes(CodaGqaL(small_options().differential(false).bias(true))), plain);
}

TEST(CodaGqaLTest, FreshParameters) {
  CodaGqaL layer(small_options()), paper(paper_options());
  EXPECT_TRUE(torch::allclose(layer->theta, torch::full({4, 3}, std::acos(0.0))));
  EXPECT_TRUE(layer->lambda_proj->bias.eq(-6.0).all().item<bool>());
  EXPECT_TRUE(layer->write_proj->weight.eq(0.0).all().item<bool>());
  EXPECT_TRUE(layer->write_proj->bias.eq(0.0).all().item<bool>());
  EXPECT_TRUE(paper->write_proj->bias.eq(-2.0).all().item<bool>());
  EXPECT_TRUE(paper->summary_eta_logit.eq(-3.0).all().item<bool>());
  EXPECT_TRUE(paper->head_norm->weight.eq(1.0).all().item<bool>());
}

TEST(CodaGqaLTest, UnboundedGradients) {
  auto layer = make_layer(small_options().head_norm(coda::HeadNorm::kRms));
  check_gradients(layer, [&](const torch::Tensor& x) { return layer->forward(x); }, false);
}

TEST(CodaGqaLTest, BoundedGradientsAcrossCalls) {
  for (const auto& options : {small_options(), paper_options()}) {
    auto layer = make_layer(options);
    const auto function = [&](const torch::Tensor& x) {
      auto state = layer->make_state(2, x.options());
      return read_in_pieces(layer, x, {9, 1, 11}, state);
    };
    check_gradients(layer, function, true);
  }
}

TEST(CodaGqaLTest, BoundedEqualsUnboundedWithinTheRing) {
  auto layer = make_layer(small_options().window(32).chunk(8));
  const auto x = tokens(2, 32);
  auto state = layer->make_state(2, x.options());
  EXPECT_TRUE(torch::allclose(layer->forward_bounded(x, state), layer->forward(x), 1e-10, 1e-12));
}

TEST(CodaGqaLTest, SplittingASequenceChangesNothing) {
  const torch::NoGradGuard no_grad;
  for (const auto& options : {small_options(), small_options().chunk(1), paper_options()}) {
    auto layer = make_layer(options);
    const auto x = tokens(3, 40);
    auto whole = layer->make_state(3, x.options()), pieces = layer->make_state(3, x.options());
    const auto y = layer->forward_bounded(x, whole);
    std::vector<int64_t> sizes{13, 0, 2};
    sizes.insert(sizes.end(), 25, 1);
    EXPECT_TRUE(torch::allclose(read_in_pieces(layer, x, sizes, pieces), y, 1e-9, 1e-11));
    EXPECT_TRUE(std::get<0>(whole.exact_pos.sort(-1)).equal(std::get<0>(pieces.exact_pos.sort(-1))));
    EXPECT_TRUE(whole.tokens_seen.equal(torch::full({3}, 40, torch::kLong)));
    EXPECT_TRUE(whole.counts.equal(pieces.counts));
    EXPECT_TRUE(torch::allclose(whole.summary_k, pieces.summary_k, 1e-9, 1e-11));
  }
}

TEST(CodaGqaLTest, WithoutAutogradTheStateStaysWhereItIs) {
  auto layer = make_layer(small_options());
  const auto x = tokens(2, 30);
  auto state = layer->make_state(2, x.options());
  const auto before = state.tensors();
  const int64_t bytes = state.nbytes();
  EXPECT_EQ(bytes, layer->state_bytes(2, torch::kDouble));
  {
    const torch::NoGradGuard no_grad;
    read_in_pieces(layer, x, {28, 1, 1}, state);
  }
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(state.tensors()[i].is_same(before[i])) << i;
  EXPECT_EQ(state.nbytes(), bytes);
  layer->forward_bounded(x, state);
  EXPECT_FALSE(state.k.is_same(before[0]));
  EXPECT_TRUE(state.k.requires_grad());
}

TEST(CodaGqaLTest, ARowDoesNotDependOnTheOthers) {
  const torch::NoGradGuard no_grad;
  auto layer = make_layer(small_options());
  layer->to(torch::kFloat);
  const auto x = tokens(3, 29).to(torch::kFloat);
  auto all = layer->make_state(3, x.options());
  const auto y = read_in_pieces(layer, x, {28, 1}, all);
  for (int64_t row = 0; row < 3; ++row) {
    auto state = layer->make_state(1, x.options());
    const auto alone = read_in_pieces(layer, x.narrow(0, row, 1), {28, 1}, state);
    EXPECT_TRUE(alone.equal(y.narrow(0, row, 1))) << row;
    EXPECT_TRUE(layer->forward(x.narrow(0, row, 1)).equal(layer->forward(x).narrow(0, row, 1))) << row;
  }
}

TEST(CodaGqaLTest, SavedAndLoaded) {
  auto layer = make_layer(paper_options());
  CodaGqaL other(paper_options());
  other->to(torch::kFloat64);  // loading keeps the dtype that a parameter has
  std::stringstream stream;
  torch::save(layer, stream);
  torch::load(other, stream);
  const auto x = tokens(1, 20);
  auto a = layer->make_state(1, x.options()), b = other->make_state(1, x.options());
  EXPECT_TRUE(layer->forward_bounded(x, a).equal(other->forward_bounded(x, b)));
}

TEST(CodaGqaLTest, AClonedLayerIsIndependent) {
  auto layer = make_layer(paper_options());
  auto copy = std::dynamic_pointer_cast<coda::CodaGqaLImpl>(layer->clone());
  ASSERT_NE(copy, nullptr);
  const auto x = tokens(1, 20);
  const auto y = layer->forward(x);
  EXPECT_TRUE(copy->forward(x).equal(y));
  {
    const torch::NoGradGuard no_grad;
    copy->head_norm->weight.mul_(2.0);
  }
  EXPECT_FALSE(copy->forward(x).equal(y));
  EXPECT_TRUE(layer->forward(x).equal(y));
}

TEST(CodaGqaLTest, PrintsItsOptions) {
  std::ostringstream stream;
  stream << CodaGqaL(small_options());
  expect_part(stream.str(), "window=8, chunk=4, exact_slots=5");
}

TEST(CodaGqaLTest, BadOptions) {
  const auto make = [](const CodaGqaLOptions& options) { return [options] { CodaGqaL layer(options); }; };
  expect_error(make(CodaGqaLOptions(12, 4, 2)), "head_dim=3 is not supported; rotary embeddings need an even head_dim");
  expect_error(make(CodaGqaLOptions(16, 4, 3)), "num_kv_heads=3 does not divide num_heads=4");
  expect_error(make(CodaGqaLOptions(18, 4, 2)), "num_heads=4 does not divide embed_dim=18");
  expect_error(make(CodaGqaLOptions(0, 4, 2)), "embed_dim=0");
  expect_error(make(small_options().chunk(3)), "chunk=3 does not divide window=8");
  expect_error(make(small_options().num_sinks(6)), "num_sinks=6 needs as many exact slots, but exact_slots=5");
  expect_error(make(small_options().summary_slots(2)), "summary_slots=2 routes tokens for all KV heads together");
  expect_error(make(small_options().policy(coda::Policy::kNoveltyLru)), "needs gates='shared'; got gates='per_head'");
  expect_error(make(small_options().bank_distance(-1)), "bank_distance=-1");
  expect_error(make(small_options().tau_exact(1.0)), "tau_exact=1 is not supported; a gate threshold lies in [0, 1)");
  expect_error(make(small_options().age_decay(-0.5)), "age_decay=-0.5");
}

TEST(CodaGqaLTest, BadInput) {
  auto layer = make_layer(small_options());
  const auto x = tokens(2, 5);
  expect_error([&] { layer->forward(x.narrow(2, 0, 6)); }, "the layer takes (batch, tokens, embed_dim) with embed_dim=12");
  expect_error([&] { layer->forward(x.narrow(0, 0, 0)); }, "an empty batch");
  expect_error([&] { layer->forward(x.to(torch::kFloat)); }, "x is of Float but the layer's parameters are of Double");
  expect_error([&] { layer->forward(x.to(torch::kMeta)); }, "x is on meta but the layer's parameters are on cpu");
  expect_error([&] { layer->make_state(0, x.options()); }, "at least one sequence; got 0");
  EXPECT_EQ(layer->forward(x.narrow(1, 0, 0)).sizes(), (std::vector<int64_t>{2, 0, kEmbed}));
}

TEST(CodaGqaLTest, ForeignStates) {
  auto layer = make_layer(small_options());
  const auto x = tokens(2, 5);
  const auto refused = [&](coda::State state, const std::string& part) {
    expect_error([&] { layer->forward_bounded(x, state); }, part);
  };
  refused(layer->make_state(3, x.options()), "the state holds 3 sequences but x has 2");
  refused(layer->make_state(2, x.options().dtype(torch::kFloat)), "the state is of Float but the layer's keys and values are of Double");
  refused(layer->make_state(2, x.options().device(torch::kMeta)), "the state is on meta but x is on cpu");
  refused(coda::State{}, "this state was not made by make_state");
  refused(CodaGqaL(small_options().window(16))->make_state(2, x.options()), "window=16, exact_slots=5");
  refused(CodaGqaL(paper_options())->make_state(2, x.options()), "summary_slots=3, gate groups=1");
}

}  // namespace
