// A program outside the library: a two-layer language model of coda::CodaGqaL learns a text that repeats itself, then
// continues it from a memory of fixed size. Exits with 1 where something is not as it should be.

#include <cstdlib>
#include <iostream>
#include <vector>

#include <coda/coda.h>
#include <torch/torch.h>

namespace {

constexpr int64_t kVocabulary = 16, kWidth = 32, kPeriod = 12, kSteps = 60;

bool all_well = true;

void check(bool condition, const char* what) {
  std::cout << (condition ? "ok    " : "WRONG ") << what << std::endl;
  all_well &= condition;
}

struct BlockImpl : torch::nn::Module {
  BlockImpl()
      : attention(register_module(
            "attention", coda::CodaGqaL(coda::CodaGqaLOptions(kWidth, 4, 2).window(16).chunk(4).exact_slots(8).num_sinks(2)))),
        before_attention(register_module("before_attention", layer_norm())),
        before_mlp(register_module("before_mlp", layer_norm())),
        mlp(register_module("mlp", torch::nn::Sequential(torch::nn::Linear(kWidth, 2 * kWidth), torch::nn::GELU(),
                                                         torch::nn::Linear(2 * kWidth, kWidth)))) {}

  torch::Tensor forward(torch::Tensor x, coda::State& state) {
    x = x + attention->forward_bounded(before_attention(x), state);
    return x + mlp->forward(before_mlp(x));
  }

  static torch::nn::LayerNorm layer_norm() { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})); }

  coda::CodaGqaL attention;
  torch::nn::LayerNorm before_attention, before_mlp;
  torch::nn::Sequential mlp;
};
TORCH_MODULE(Block);

struct LanguageModelImpl : torch::nn::Module {
  LanguageModelImpl()
      : embedding(register_module("embedding", torch::nn::Embedding(kVocabulary, kWidth))),
        first(register_module("first", Block())),
        second(register_module("second", Block())),
        head(register_module("head", torch::nn::Linear(kWidth, kVocabulary))) {}

  std::vector<coda::State> make_states(int64_t batch) {
    const auto options = embedding->weight.options();
    return {first->attention->make_state(batch, options), second->attention->make_state(batch, options)};
  }

  // tokens (B, L) -> logits (B, L, vocabulary)
  torch::Tensor forward(const torch::Tensor& tokens, std::vector<coda::State>& states) {
    return head(second->forward(first->forward(embedding(tokens), states[0]), states[1]));
  }

  torch::nn::Embedding embedding;
  Block first, second;
  torch::nn::Linear head;
};
TORCH_MODULE(LanguageModel);

// Random phrases, each repeated over and over: (batch, length).
torch::Tensor repeating_text(int64_t batch, int64_t length) {
  const auto phrase = torch::randint(kVocabulary, {batch, kPeriod});
  return phrase.repeat({1, length / kPeriod + 1}).narrow(1, 0, length);
}

int64_t bytes(const std::vector<coda::State>& states) { return states[0].nbytes() + states[1].nbytes(); }

}  // namespace

int main() {
  torch::manual_seed(0);
  LanguageModel model;
  const auto text = repeating_text(4, 61);
  const auto input = text.narrow(1, 0, 60), target = text.narrow(1, 1, 60);

  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  double first_loss = 0.0, loss = 0.0;
  for (int64_t step = 0; step < kSteps; ++step) {
    auto states = model->make_states(input.size(0));
    const auto value = torch::nn::functional::cross_entropy(model(input, states).flatten(0, 1), target.flatten());
    optimizer.zero_grad();
    value.backward();
    optimizer.step();
    loss = value.item<double>();
    if (step == 0) first_loss = loss;
  }
  std::cout << "loss " << first_loss << " -> " << loss << " after " << kSteps << " steps\n";
  check(loss < 0.5 * first_loss, "training halves the loss");

  const torch::NoGradGuard no_grad;
  auto states = model->make_states(text.size(0)), stepwise = model->make_states(text.size(0));
  const int64_t held = bytes(states);
  const auto logits = model(input, states);
  std::vector<torch::Tensor> steps;
  for (const auto& token : input.split(1, 1)) steps.push_back(model(token, stepwise));
  const double difference = (torch::cat(steps, 1) - logits).abs().max().item<double>();
  std::cout << "prefill and token-by-token logits differ by " << difference << "\n";
  check(difference < 1e-4, "token by token equals one call");

  auto token = logits.narrow(1, 59, 1).argmax(-1);
  int64_t right = 0;
  constexpr int64_t kContinued = 240;
  for (int64_t i = 0; i < kContinued; ++i) {
    const auto expected = text.select(1, (60 + i) % kPeriod).unsqueeze(1);
    right += token.eq(expected).sum().item<int64_t>();
    token = model(token, states).argmax(-1);
  }
  const double accuracy = static_cast<double>(right) / static_cast<double>(kContinued * text.size(0));
  std::cout << "continued " << kContinued << " tokens, " << 100.0 * accuracy << " % as in the text, in " << bytes(states)
            << " bytes of memory\n";
  check(accuracy > 0.8, "the continuation follows the text");
  check(bytes(states) == held, "memory does not grow");
  check(states[0].tokens_seen.eq(60 + kContinued).all().item<bool>(), "every token was read");
  return all_well ? EXIT_SUCCESS : EXIT_FAILURE;
}
