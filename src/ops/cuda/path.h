#pragma once

// Which path serves a call of an attention op.

#include <cstdlib>
#include <string_view>

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <kernels/common/path.h>

#include "launch.h"

namespace coda::cuda {

using kernels::Path;

constexpr const char* name_of(Path path) {
  return path == Path::kSm90 ? "sm90" : path == Path::kSm80 ? "sm80" : "portable";
}

// The fastest, or the slower one that the environment variable of the op names for tests and measurements.
inline kernels::PathChoice choose_path(const char* variable, const at::Tensor& q, double scale) {
  const auto* device = at::cuda::getDeviceProperties(q.device().index());
  const auto best = kernels::attention_path(10 * device->major + device->minor, dtype_of(q), static_cast<int>(q.size(-1)), scale);
  const char* wanted = std::getenv(variable);
  if (!wanted || !*wanted) return best;
  for (const Path path : {Path::kPortable, Path::kSm80, Path::kSm90}) {
    if (std::string_view(wanted) != name_of(path)) continue;
    TORCH_CHECK_VALUE(path <= best.path, variable, "=", wanted, " cannot serve this call, whose fastest path is ",
                      name_of(best.path), " (", best.reason, "); unset it");
    return {path, "named by the environment"};
  }
  TORCH_CHECK_VALUE(false, variable, "=", wanted, " is not a path; use portable, sm80 or sm90, or unset it");
}

// Whether torch.use_deterministic_algorithms asks for the same bits every time.
inline bool asks_for_determinism() {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
}

// As projections give it where the path can read that: rows of contiguous elements that begin at multiples of 16 bytes.
inline at::Tensor readable(const at::Tensor& t, Path path) {
  if (path == Path::kPortable) return t.contiguous();
  const auto aligned = [](const at::Tensor& x) {
    if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0) return false;
    if (x.stride(-1) != 1) return false;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      if (x.size(i) > 1 && (x.stride(i) <= 0 || x.stride(i) * x.element_size() % 16 != 0)) return false;
    }
    return true;
  };
  return t.numel() == 0 || aligned(t) ? t : t.clone(at::MemoryFormat::Contiguous);
}

}  // namespace coda::cuda
