#include <coda/state.h>

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace coda {

std::vector<at::Tensor> State::tensors() const {
  return {k, v, gate, exact_pos, tokens_seen, last_touch, counts, summary_k, summary_v, summary_mass};
}

State State::from_tensors(at::TensorList t) {
  TORCH_CHECK_VALUE(t.size() == kFields, "a state is ", kFields, " tensors (k, v, gate, exact_pos, tokens_seen, last_touch, ",
                    "counts, summary_k, summary_v, summary_mass); got ", t.size());
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]};
}

int64_t State::nbytes() const {
  int64_t total = 0;
  for (const auto& t : tensors()) total += static_cast<int64_t>(t.nbytes());
  return total;
}

State make_state(int64_t sequences, int64_t num_kv_heads, int64_t head_dim, int64_t window, int64_t exact_slots,
                 int64_t summary_slots, int64_t gate_groups, bool novelty_lru, const at::TensorOptions& kv_options) {
  TORCH_CHECK_VALUE(sequences > 0, "a state holds at least one sequence; got ", sequences);
  const auto wide = kv_options.dtype(kv_options.dtype() == at::kDouble ? at::kDouble : at::kFloat);
  const auto index = kv_options.dtype(at::kLong);
  const auto slots = window + exact_slots;
  const State state{at::empty({sequences, num_kv_heads, slots, head_dim}, kv_options),
                    at::empty({sequences, num_kv_heads, slots, head_dim}, kv_options),
                    at::empty({sequences, gate_groups, slots}, wide),
                    at::empty({sequences, gate_groups, exact_slots}, index),
                    at::empty({sequences}, index),
                    at::empty({sequences, novelty_lru ? exact_slots : 0}, index),
                    at::empty({sequences, 2}, index),
                    at::empty({sequences, num_kv_heads, summary_slots, head_dim}, wide),
                    at::empty({sequences, num_kv_heads, summary_slots, head_dim}, wide),
                    at::empty({sequences, summary_slots}, wide)};
  static const auto clear =
      c10::Dispatcher::singleton().findSchemaOrThrow("coda::_clear_state_", "").typed<void(at::TensorList)>();
  clear.call(state.tensors());
  return state;
}

}  // namespace coda
