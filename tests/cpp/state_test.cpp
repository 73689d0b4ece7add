#include <gtest/gtest.h>
#include <torch/torch.h>

#include <coda/coda.h>

namespace {

coda::State novelty_state(at::ScalarType dtype) {
  return coda::make_state(/*sequences=*/2, /*num_kv_heads=*/3, /*head_dim=*/4, /*window=*/8, /*exact_slots=*/5, /*summary_slots=*/2,
                          /*gate_groups=*/1, /*novelty_lru=*/true, at::TensorOptions().dtype(dtype));
}

TEST(StateTest, ShapesAndDtypes) {
  const auto state = novelty_state(at::kBFloat16);
  using Sizes = std::vector<int64_t>;
  EXPECT_EQ(state.k.sizes(), (Sizes{2, 3, 13, 4}));
  EXPECT_EQ(state.v.sizes(), (Sizes{2, 3, 13, 4}));
  EXPECT_EQ(state.gate.sizes(), (Sizes{2, 1, 13}));
  EXPECT_EQ(state.exact_pos.sizes(), (Sizes{2, 1, 5}));
  EXPECT_EQ(state.last_touch.sizes(), (Sizes{2, 5}));
  EXPECT_EQ(state.summary_k.sizes(), (Sizes{2, 3, 2, 4}));
  EXPECT_EQ(state.summary_mass.sizes(), (Sizes{2, 2}));
  EXPECT_EQ(state.k.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.gate.scalar_type(), at::kFloat);
  EXPECT_EQ(state.summary_v.scalar_type(), at::kFloat);
  EXPECT_EQ(novelty_state(at::kDouble).gate.scalar_type(), at::kDouble);
  EXPECT_TRUE(state.exact_pos.eq(-1).all().item<bool>());
  EXPECT_EQ(state.tokens_seen.sum().item<int64_t>(), 0);
}

TEST(StateTest, BytesAreTheTrueTotal) {
  // k, v; gate; exact_pos, tokens_seen, last_touch, counts; summary k, v, mass.
  const int64_t expected = 2 * (2 * 3 * 13 * 4) * 2 + (2 * 13) * 4 + (2 * 5 + 2 + 2 * 5 + 2 * 2) * 8 + (2 * 2 * 3 * 2 * 4 + 2 * 2) * 4;
  EXPECT_EQ(novelty_state(at::kBFloat16).nbytes(), expected);
}

TEST(StateTest, RoundTripThroughTensors) {
  const auto state = novelty_state(at::kFloat);
  const auto copy = coda::State::from_tensors(state.tensors());
  ASSERT_EQ(state.tensors().size(), coda::State::kFields);
  for (size_t i = 0; i < coda::State::kFields; ++i) EXPECT_TRUE(copy.tensors()[i].is_same(state.tensors()[i])) << i;
  EXPECT_THROW(coda::State::from_tensors({state.k, state.v}), c10::ValueError);
}

TEST(StateTest, NeedsASequence) {
  EXPECT_THROW(coda::make_state(0, 1, 4, 8, 2, 0, 1, false, at::kFloat), c10::ValueError);
}

TEST(OptionsTest, NamesRoundTrip) {
  for (const auto* name : {"half", "interleaved"}) EXPECT_EQ(to_string(coda::parse_pairs(name)), name);
  for (const auto* name : {"retention", "novelty_lru"}) EXPECT_EQ(to_string(coda::parse_policy(name)), name);
  for (const auto* name : {"value", "low_freq_key"}) EXPECT_EQ(to_string(coda::parse_summary_routing(name)), name);
  for (const auto* name : {"per_head", "shared"}) EXPECT_EQ(to_string(coda::parse_gates(name)), name);
  for (const auto* name : {"identity", "rms"}) EXPECT_EQ(to_string(coda::parse_head_norm(name)), name);
  EXPECT_THROW(coda::parse_pairs("diagonal"), c10::ValueError);
  EXPECT_THROW(coda::parse_policy("fifo"), c10::ValueError);
  EXPECT_THROW(coda::parse_summary_routing("query"), c10::ValueError);
  EXPECT_THROW(coda::parse_gates("none"), c10::ValueError);
  EXPECT_THROW(coda::parse_head_norm("layer"), c10::ValueError);
}

}  // namespace
