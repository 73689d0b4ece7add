#include "../common/launch.cuh"
#include "gates.cuh"
#include "launch.h"
#include "novelty.cuh"
#include "sm90/steps.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 512;

template <class A>
struct Layout {
  NoveltyBank<A> bank;
  int* candidate;  // (T)

  __host__ __device__ Layout(Carver& carver, const RouteExactBankParams& p)
      : bank(carver, p.slots, p.candidates, p.kv_heads), candidate(carver.take<int>(p.candidates)) {}
};

template <class T>
__global__ void __launch_bounds__(kThreads) route_exact_bank_kernel(RouteExactBankParams p) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int candidates;
  Carver sizes(nullptr);
  Layout<A>(sizes, p);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const Layout<A> work(carver, p);
  const auto& bank = work.bank;
  const int64_t b = blockIdx.x;
  const int64_t* position = p.position + b * p.candidates;
  for (int j = threadIdx.x; j < p.slots; j += blockDim.x) {
    bank.occupant[j] = p.used[b * p.slots + j] ? NoveltyBank<A>::kHeld : NoveltyBank<A>::kFree;
    bank.last_touch[j] = p.last_touch[b * p.slots + j];
  }
  for (int t = threadIdx.x; t < p.candidates; t += blockDim.x) {
    p.slot[b * p.candidates + t] = -1;
    p.action[b * p.candidates + t] = kSkip;
  }
  if (warp_id() == 0) {
    const int kept = p.slots == p.num_sinks ? 0 : compact(work.candidate, p.candidates, [&](int t) {
      return read_double(p.gate, p.gate_dtype, b * p.candidates + t) >= p.tau_exact;
    });
    if (lane_id() == 0) candidates = kept;
  }
  __syncthreads();
  const int kept = candidates;
  const auto row = [&](const void* rows, int count, int h, int i) {
    return static_cast<const T*>(rows) + ((b * p.kv_heads + h) * count + i) * p.dim;
  };
  const auto slot_value = [&](int j, int h) { return row(p.bank_value, p.slots, h, j); };
  const auto every = [](int) { return true; };
  row_norms(bank.slot_norm, p.slots, p.kv_heads, p.dim,
            [&](int j) { return bank.occupant[j] != NoveltyBank<A>::kFree; }, slot_value, every);
  score_candidates(bank, p.slots, kept, p.kv_heads, p.dim, slot_value,
                   [&](int i, int h) { return row(p.value, p.candidates, h, work.candidate[i]); });
  if (warp_id() == 0) {
    const NoveltyRule rule{p.slots, p.num_sinks, p.tau_novel, p.tau_match, p.refresh_on_hit};
    route_in_order(
        bank, rule, kept, [&](int i) { return position[work.candidate[i]]; },
        [&](int i, int slot, RouteAction action) {
          if (lane_id() != 0) return;
          p.slot[b * p.candidates + work.candidate[i]] = slot;
          p.action[b * p.candidates + work.candidate[i]] = action;
        });
  }
  __syncthreads();
  for (int j = threadIdx.x; j < p.slots; j += blockDim.x) p.new_last_touch[b * p.slots + j] = bank.last_touch[j];
}

size_t layout_bytes(const RouteExactBankParams& p, DType dtype) {
  Carver sizes(nullptr);
  if (dtype == DType::kFloat64) {
    Layout<double>(sizes, p);
  } else {
    Layout<float>(sizes, p);
  }
  return sizes.used();
}

}  // namespace

size_t route_exact_bank_workspace(const RouteExactBankParams& params, DType dtype) {
  return workspace_part(layout_bytes(params, dtype), params.batch);
}

cudaError_t route_exact_bank(const RouteExactBankParams& params, DType dtype, cudaStream_t stream) {
  if (device_capability() == 90 && sm90::serves(params, dtype)) return sm90::route_exact_bank(params, dtype, stream);
  return dispatch(dtype, [&](auto zero) {
    return launch(route_exact_bank_kernel<decltype(zero)>, dim3(static_cast<unsigned>(params.batch)), kThreads,
                  shared_part(layout_bytes(params, dtype)), stream, params);
  });
}

}  // namespace coda::kernels
