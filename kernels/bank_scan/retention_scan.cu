#include "../common/launch.cuh"
#include "retention.cuh"
#include "scan_view.cuh"
#include "steps.h"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;

// One block walks the chunks of one sequence and gate group. It reads gates only.
template <class A>
__global__ void __launch_bounds__(kThreads) retention_kernel(BankScanForward p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int slots = p.exact_slots, sinks = p.num_sinks;
  Carver sizes(nullptr);
  RetentionBank(sizes, slots, p.chunk);
  Carver carver(block_memory(p.workspace, sizes.used(), shared));
  const RetentionBank bank(carver, slots, p.chunk);

  const int group = static_cast<int>(blockIdx.x % p.gate_groups);
  const ScanView<A> view(p, blockIdx.x / p.gate_groups);
  const int64_t bank_row = (view.n * p.gate_groups + group) * slots;
  const auto source_of = [&](int64_t position) { return view.source_of(position); };
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    const int64_t position = p.exact_pos[bank_row + j];
    bank.position[j] = position;
    bank.source[j] = p.window + j;
    bank.key[j] = retention_key(view.gate(p.window + j, group), p.age_decay, position);
  }
  rank_bank(bank, slots, sinks);
  int64_t inserted = 0;
  for (int64_t i = 0; i < view.span.chunks; ++i) {
    const int64_t start = view.span.chunk_start(i, p.chunk);
    if (view.evicts(start)) {
      const int64_t evicted = start - p.window;
      const int pinned = view.sinks_at(start);
      for (int c = threadIdx.x; c < p.chunk; c += blockDim.x) {
        const int64_t position = evicted + c;
        if (c < pinned) {
          bank.position[position] = position;
          bank.source[position] = source_of(position);
        } else {
          bank.offered[c - pinned] = retention_key(view.gate(source_of(position), group), p.age_decay, position);
        }
      }
      inserted += pinned + offer_tokens(bank, slots, sinks, evicted + pinned, p.chunk - pinned, source_of);
    }
    for (int j = threadIdx.x; j < slots; j += blockDim.x) {
      p.index[view.index_row(i, group) + j] = bank.position[j] < 0 ? -1 : bank.source[j];
    }
    __syncthreads();
  }
  for (int j = threadIdx.x; j < slots; j += blockDim.x) {
    p.source[bank_row + j] = bank.position[j] < 0 ? -1 : bank.source[j];
    p.new_exact_pos[bank_row + j] = bank.position[j];
  }
  if (threadIdx.x == 0) add_count(p.new_counts + 2 * view.n, inserted);
}

}  // namespace

size_t retention_scan_workspace(const BankScanParams& params) {
  Carver sizes(nullptr);
  RetentionBank(sizes, params.exact_slots, params.chunk);
  return workspace_part(sizes.used(), params.sequences * params.gate_groups);
}

cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  Carver sizes(nullptr);
  RetentionBank(sizes, params.exact_slots, params.chunk);
  const dim3 grid(static_cast<unsigned>(params.sequences * params.gate_groups));
  const auto kernel = dtype == DType::kFloat64 ? retention_kernel<double> : retention_kernel<float>;
  return launch(kernel, grid, kThreads, shared_part(sizes.used()), stream, params);
}

}  // namespace coda::kernels
