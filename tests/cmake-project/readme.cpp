#include <iostream>

#include <coda/coda.h>
#include <torch/torch.h>

int main() {
  coda::CodaGqaL layer(coda::CodaGqaLOptions(256, 8, 2).window(64).chunk(16).exact_slots(32));
  const auto x = torch::randn({2, 500, 256});
  const auto y = layer->forward(x);  // every token, differentiable

  const torch::NoGradGuard no_grad;
  auto state = layer->make_state(2, x.options());
  const auto prefill = layer->forward_bounded(x, state);               // any number of tokens
  const auto next = layer->forward_bounded(x.narrow(1, 0, 1), state);  // or one
  std::cout << state.nbytes() << " bytes after " << state.tokens_seen[0].item<int64_t>() << " tokens\n";
}
