#include "retention_segments.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;

// The bank that a sequence came with, in order of rank.
struct CarriedBank {
  uint64_t* key;   // (capacity)
  int64_t* order;  // (capacity) decides between equal keys

  __host__ __device__ CarriedBank(Carver& carver, int capacity)
      : key(carver.take<uint64_t>(capacity)), order(carver.take<int64_t>(capacity)) {}

  template <class A>
  __device__ void sort(const RetentionView<A>& view) const {
    const auto& p = view.scan;
    for (int j = threadIdx.x; j < p.capacity; j += blockDim.x) {
      const int slot = p.num_sinks + j;
      const int64_t position = p.exact_pos[view.state_exact() + slot];
      const bool free = position < 0;
      key[j] = free ? kFreeSlot : ordered_key(retention_key(view.gate(p.window + slot, view.group), p.age_decay, position));
      order[j] = free ? j : position;  // arrivals take the slots of the last ranks: free ones fill in ascending order
    }
    __syncthreads();
    const int64_t row = view.bank_row(0) * p.capacity;
    for (int j = threadIdx.x; j < p.capacity; j += blockDim.x) {
      int rank = 0;
      for (int i = 0; i < p.capacity; ++i) rank += key[i] > key[j] || (key[i] == key[j] && order[i] > order[j]);
      p.bank_key[row + rank] = key[j];
      p.bank_source[row + rank] = key[j] == kFreeSlot ? -1 : p.window + p.num_sinks + j;
      p.bank_slot[row + rank] = j;
    }
  }
};

// The first blocks order the banks that sequences came with, the others list the best tokens of a segment.
template <class A>
__global__ void __launch_bounds__(kThreads) retention_lists_kernel(RetentionScan p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Carver carver(block_memory(p.block_workspace, p.block_bytes, shared));
  const int64_t states = p.sequences * p.gate_groups;
  if (blockIdx.x < states) {
    const RetentionView<A> view(p, blockIdx.x / p.gate_groups, static_cast<int>(blockIdx.x % p.gate_groups));
    CarriedBank(carver, p.capacity).sort(view);
    return;
  }
  const RetentionSegment<A> segment(p, blockIdx.x - states);
  if (segment.used_rows() == 0) return;
  const int tokens = p.segment_tokens, chunk = p.chunk;
  const SortedChunks sorted(carver, tokens);
  sorted.sort(segment, tokens, chunk);
  const int64_t row = segment.view.segment_row(segment.number()) * p.listed, first = segment.first_position();
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const uint64_t key = sorted.key[i];
    const int own = i / chunk * chunk;
    int rank = i - own;
    for (int b = 0; b < own && rank < p.listed; b += chunk) rank += count_above(sorted.key + b, chunk, key);
    for (int b = own + chunk; b < tokens && rank < p.listed; b += chunk) rank += count_above(sorted.key + b, chunk, key - 1);
    if (rank >= p.listed) continue;
    p.list_key[row + rank] = key;
    p.list_source[row + rank] = key == kNotOffered ? -1 : segment.view.source_of(first + sorted.token[i]);
  }
}

}  // namespace

size_t retention_lists_block(const RetentionScan& p) {
  Carver bank(nullptr), tokens(nullptr);
  CarriedBank(bank, p.capacity);
  SortedChunks(tokens, p.segment_tokens);
  return bank.used() > tokens.used() ? bank.used() : tokens.used();
}

cudaError_t retention_lists(const RetentionScan& scan, DType dtype, cudaStream_t stream) {
  RetentionScan p = scan;
  p.block_bytes = retention_lists_block(scan);
  const dim3 grid(static_cast<unsigned>((p.sequences + p.segments) * p.gate_groups));
  const auto kernel = dtype == DType::kFloat64 ? retention_lists_kernel<double> : retention_lists_kernel<float>;
  return launch(kernel, grid, kThreads, shared_part(p.block_bytes), stream, p);
}

}  // namespace coda::kernels
