#include <kernels/common/fill.h>
#include <torch/library.h>

#include "launch.h"

namespace coda::cuda {
namespace {

// One launch for all tensors.
void clear_state_(at::TensorList tensors) {
  static_assert(State::kFields <= kernels::FillParams::kPieces);
  const auto state = State::from_tensors(tensors);
  const c10::cuda::CUDAGuard guard(state.k.device());
  kernels::FillParams p{};
  for (const auto& t : state.tensors()) {
    const bool free = t.is_same(state.exact_pos);
    const auto bytes = static_cast<int64_t>(t.nbytes());
    if (!t.is_contiguous() || bytes % 4 != 0 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) {
      t.fill_(free ? -1 : 0);
    } else if (bytes > 0) {
      p.piece[p.count++] = {t.data_ptr(), bytes, free ? ~uint32_t{0} : 0, 0};
    }
  }
  C10_CUDA_CHECK(kernels::fill(p, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) { m.impl("_clear_state_", clear_state_); }

}  // namespace coda::cuda
