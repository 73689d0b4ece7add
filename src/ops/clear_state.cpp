#include <coda/state.h>
#include <torch/library.h>

namespace coda {
namespace {

void clear_state_(at::TensorList tensors) {
  const auto state = State::from_tensors(tensors);
  for (const auto& t : state.tensors()) t.fill_(t.is_same(state.exact_pos) ? -1 : 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CompositeExplicitAutograd, m) { m.impl("_clear_state_", clear_state_); }

}  // namespace coda
