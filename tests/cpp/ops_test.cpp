// The ops as C++ functions against a few lines of plain ATen; their full specification is tested from Python.

#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <coda/coda.h>

namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 6;

torch::Tensor randn(at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble); }

torch::Tensor inv_freq() {
  return torch::pow(10000.0, torch::arange(0, kDim, 2, torch::kDouble) / -static_cast<double>(kDim));
}

// Half-split pairs of x (..., D) turned by angle (..., D/2).
torch::Tensor turn(const torch::Tensor& x, const torch::Tensor& angle) {
  const auto halves = x.chunk(2, -1);
  return torch::cat({halves[0] * angle.cos() - halves[1] * angle.sin(), halves[0] * angle.sin() + halves[1] * angle.cos()}, -1);
}

// q (B, Lq, H, D), k and v (B, Lk, Hkv, D); key j is visible to query i where j <= i + Lk - Lq.
torch::Tensor plain_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v) {
  const int64_t group = q.size(2) / k.size(2), offset = k.size(1) - q.size(1);
  const auto logits = torch::einsum("bihd,bjhd->bhij", {q, k.repeat_interleave(group, 2)}) / std::sqrt(q.size(3));
  const auto hidden = torch::ones({q.size(1), k.size(1)}, torch::kBool).triu(offset + 1);
  const auto p = logits.masked_fill(hidden, -std::numeric_limits<double>::infinity()).softmax(-1);
  return torch::einsum("bhij,bjhd->bihd", {p, v.repeat_interleave(group, 2)});
}

class OpsTest : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(3); }
};

TEST_F(OpsTest, RopeTurnsAndTurnsBack) {
  const auto x = randn({2, 5, kHeads, kDim});
  const auto positions = torch::tensor({0, 1, 7, 100, 1000000}).expand({2, 5});
  const auto turned = coda::apply_rope(x, positions, inv_freq());
  const auto angle = positions.to(torch::kDouble).unsqueeze(-1).unsqueeze(-1) * inv_freq();
  EXPECT_TRUE(torch::allclose(turned, turn(x, angle), 1e-10, 1e-10));
  EXPECT_TRUE(torch::allclose(coda::apply_rope(turned, positions, inv_freq(), 1.0, coda::Pairs::kHalf, true), x, 1e-10, 1e-10));
  EXPECT_TRUE(torch::allclose(coda::apply_rope(x, positions, inv_freq(), 2.0), 2 * turned));
}

TEST_F(OpsTest, DiffAttentionIsTheDifferenceOfTwoStreams) {
  const auto q = randn({2, 7, kHeads, kDim}), k = randn({2, 9, kKvHeads, kDim}), v = randn({2, 9, kKvHeads, kDim});
  const auto lam = torch::rand({2, 7, kHeads}, torch::kDouble), theta = randn({kHeads, kDim / 2}), weight = randn({kDim});
  EXPECT_TRUE(torch::allclose(coda::diff_attention(q, k, v), plain_attention(q, k, v)));
  const auto difference = plain_attention(q, k, v) - lam.unsqueeze(-1) * plain_attention(turn(q, theta), k, v);
  EXPECT_TRUE(torch::allclose(coda::diff_attention(q, k, v, lam, theta), difference));
  const auto normed = difference * (difference.square().mean(-1, true) + 1e-6).rsqrt() * weight;
  EXPECT_TRUE(torch::allclose(coda::diff_attention(q, k, v, lam, theta, weight), normed));
}

TEST_F(OpsTest, PackedSequencesAreSeparate) {
  const auto q = randn({7, kHeads, kDim}), k = randn({7, kKvHeads, kDim}), v = randn({7, kKvHeads, kDim});
  const auto ends = torch::tensor({0, 3, 3, 7});
  const auto y = coda::diff_attention(q, k, v, {}, {}, {}, ends, ends);
  for (const auto& [from, to] : {std::pair{0, 3}, std::pair{3, 7}}) {
    const auto part = [&, from = from, to = to](const torch::Tensor& t) { return t.slice(0, from, to).unsqueeze(0); };
    EXPECT_TRUE(torch::allclose(part(y), plain_attention(part(q), part(k), part(v))));
  }
}

TEST_F(OpsTest, RouteExactBank) {
  // One head; the bank holds e0 in slot 0. Candidates: e0 again, e1, a closed gate, e1 once more.
  const auto e = torch::eye(4, torch::kDouble);
  const auto value = torch::stack({e[0], e[1], e[2], e[1]}).view({1, 1, 4, 4});
  const auto gate = torch::tensor({0.9, 0.8, 0.01, 0.7}, torch::kDouble).view({1, 4});
  const auto position = torch::tensor({10, 11, 12, 13}).view({1, 4});
  const auto bank = torch::stack({e[0], torch::zeros({4}, torch::kDouble)}).view({1, 1, 2, 4});
  const auto used = torch::tensor({1, 0}).to(torch::kBool).view({1, 2});
  const auto touched = torch::tensor({5, 0}).view({1, 2});
  const auto [slot, action, last_touch] = coda::route_exact_bank(value, gate, position, bank, used, touched);
  const auto code = [](coda::RouteAction a) { return static_cast<int64_t>(a); };
  EXPECT_TRUE(slot.equal(torch::tensor({0, 1, -1, 1}).view({1, 4})));
  EXPECT_TRUE(action.equal(torch::tensor({code(coda::RouteAction::kTouch), code(coda::RouteAction::kInsert),
                                          code(coda::RouteAction::kSkip), code(coda::RouteAction::kTouch)})
                               .view({1, 4})));
  EXPECT_TRUE(last_touch.equal(torch::tensor({10, 13}).view({1, 2})));
}

TEST_F(OpsTest, BoundedAttentionOverTwoSequences) {
  const coda::MemoryOptions memory{.window = 8, .chunk = 4, .num_sinks = 1, .bank_distance = 16};
  constexpr int64_t kSequences = 2, kLength = 22, kExact = 3;
  const auto positions = torch::arange(kLength).expand({kSequences, kLength});
  const auto q = coda::apply_rope(randn({kSequences, kLength, kHeads, kDim}), positions, inv_freq());
  const auto k = coda::apply_rope(randn({kSequences, kLength, kKvHeads, kDim}), positions, inv_freq());
  const auto v = randn({kSequences, kLength, kKvHeads, kDim}), gate = randn({kSequences, kLength, kKvHeads});
  const auto empty = [&] { return coda::make_state(kSequences, kKvHeads, kDim, 8, kExact, 0, kKvHeads, false, torch::kDouble); };

  const auto [y, state] = coda::bounded_forward(q, k, v, {}, {}, {}, gate, {}, empty(), {}, inv_freq(), memory, {});
  // The ring alone serves the first two chunks.
  EXPECT_TRUE(torch::allclose(y.narrow(1, 0, 8), plain_attention(q.narrow(1, 0, 8), k.narrow(1, 0, 8), v.narrow(1, 0, 8))));
  EXPECT_TRUE(state.tokens_seen.eq(kLength).all().item<bool>());
  EXPECT_TRUE(state.exact_pos.select(2, 0).eq(0).all().item<bool>());

  // The last chunk opened at 20 and evicted up to position 15: the bank keeps the best of 1..15 by gate and age.
  const auto score = gate.narrow(1, 1, 15) + 1e-3 * torch::arange(1, 16, torch::kDouble).view({1, 15, 1});
  const auto best = std::get<1>(score.topk(kExact - 1, 1)).transpose(1, 2) + 1;
  EXPECT_TRUE(std::get<0>(state.exact_pos.narrow(2, 1, kExact - 1).sort(-1)).equal(std::get<0>(best.sort(-1))));

  auto stepped = empty();
  for (int64_t t = 0; t < kLength; ++t) {
    const auto at = [t](const torch::Tensor& x) { return x.select(1, t); };
    const auto step = coda::decode_step_(at(q), at(k), at(v), {}, {}, {}, at(gate), stepped, {}, inv_freq(), memory, {});
    EXPECT_TRUE(torch::allclose(step, at(y), 1e-9, 1e-11)) << t;
  }
  EXPECT_TRUE(std::get<0>(stepped.exact_pos.sort(-1)).equal(std::get<0>(state.exact_pos.sort(-1))));
}

TEST_F(OpsTest, ErrorsNameTheProblem) {
  const auto q = randn({1, 3, 3, kDim}), k = randn({1, 3, 2, kDim});
  EXPECT_THROW(coda::diff_attention(q, k, k), c10::Error);
  EXPECT_THROW(coda::diff_attention(k, k, k.to(torch::kFloat)), c10::Error);
}

}  // namespace
