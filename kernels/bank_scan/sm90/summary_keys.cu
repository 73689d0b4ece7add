#include "../../common/mma.cuh"
#include "candidates.cuh"
#include "summary_moves.cuh"
#include "summary_shared.cuh"

namespace coda::kernels::sm90 {
namespace {

constexpr int kElements = 64;  // of a key, that a block has
constexpr int kWarps = kScanThreads / kWarp, kPairs = kSummaryRows / kWarps / 2;
constexpr int kBuffers = 3;

// The slots' keys and masses: a block has 64 elements of one head's slots. It follows the scan, which tells who went to a slot as
// soon as it is decided. Addresses move on from chunk to chunk, since most instructions would go to finding them.
template <class T>
struct SummaryKeys {
  struct Shared {
    T key[kBuffers][kSummaryRows * kElements];
    float gate[kBuffers][kSummaryRows];
    Members members[2][kSummaryRows];  // of all slots
  };

  const BankScan& p;
  const ScanView<T> view;
  Shared& work;
  const int head, part, tokens, chunks;
  const float log_stay;

  __device__ SummaryKeys(const BankScan& params, int64_t n, int block, Shared& shared)
      : p(params), view(params, n), work(shared), head(block / (params.dim / kElements)), part(block % (params.dim / kElements)),
        tokens(params.lists.tokens), chunks(static_cast<int>(view.span.chunks)),
        log_stay(log2f(sigmoid(-static_cast<const float*>(params.eta_logit)[head]))) {}

  // Of pair 0; those of the next pair are two further.
  static __device__ int first_slot() { return warp_id() * kPairs * 2 + lane_id() / (kWarp / 2); }
  __device__ bool real(int pair) const { return first_slot() + pair * 2 < p.summary_slots; }
  // This lane's elements of its first slot in row `row` of a state or of the snapshots, and the slot's mass.
  template <class Float>
  __device__ Float* key(Float* all, int64_t row) const {
    return all + view.summary_row(row, head, first_slot()) + part * kElements + half_lane() * 4;
  }
  template <class Float>
  __device__ Float* mass(Float* all, int64_t row) const {
    return all + row * p.summary_slots + first_slot();
  }

  struct Slots {
    float k[kPairs][4], mass[kPairs];
  };

  __device__ void run() const {
    Slots bank;
    load_state(bank);
    float* to_key = key(static_cast<float*>(p.summary_k), view.span.row0);
    float* to_mass = mass(static_cast<float*>(p.summary_mass), view.span.row0);
    const auto write_snapshot = [&] {
      write(to_key, to_mass, bank);
      to_key += int64_t{p.kv_heads} * p.summary_slots * p.dim;
      to_mass += p.summary_slots;
    };
    int i = 0;
    for (; i < chunks && !view.evicts(view.span.chunk_start(i, p.chunk)); ++i) write_snapshot();
    ListGate<kSplits> lists{i};
    const auto await_list = [&](int chunk) {
      lists.await(chunk, chunks, [&] { return p.lists.summary_ready + view.span.row0 * kSplits; });
    };

    // Each for the chunk that is asked for next: a candidate's key, of which this thread copies a part, eight threads a
    // candidate; gates; members, by warp 0 for all.
    const int64_t row = view.span.row0 + i;
    const int candidate = static_cast<int>(threadIdx.x) / 8;
    const CandidateRows* rows = p.lists.summary_rows + (row * p.kv_heads + head) * tokens + candidate;
    const float* gates = p.lists.summary_gate + row * tokens + threadIdx.x * 4;
    const SlotMembers* members = p.lists.members + row * p.summary_slots + lane_id();
    const auto next_key = [&](int chunk) {
      const CandidateRows* from = rows;
      rows += int64_t{p.kv_heads} * tokens;
      const bool some = chunk < chunks && candidate < tokens;
      return some ? static_cast<const T*>(from->key) + part * kElements + threadIdx.x % 8 * kPacket : nullptr;
    };
    const auto fetch = [&](int chunk, const T* from) {
      const int buffer = chunk % kBuffers;
      if (from != nullptr) ampere::copy_packet(work.key[buffer] + threadIdx.x * kPacket, from, true);
      if (chunk < chunks && static_cast<int>(threadIdx.x) * 4 < tokens) {
        ampere::copy_packet(work.gate[buffer] + threadIdx.x * 4, gates, true);
      }
      gates += tokens;
      ampere::commit_copies();
    };
    SlotMembers next[2];
    const auto load_members = [&](int chunk) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        next[u] = {kThere, kThere};
        if (chunk < chunks && lane_id() + u * kWarp < p.summary_slots) next[u] = load_relaxed(members + u * kWarp);
      }
      members += p.summary_slots;
    };
    const auto await_members = [&](Members* to) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        while (next[u].low == 0 || next[u].high == 0) next[u] = load_relaxed(members - p.summary_slots + u * kWarp);
        to[lane_id() + u * kWarp] = {{static_cast<uint32_t>(next[u].low), static_cast<uint32_t>(next[u].high)}};
      }
    };

    await_list(i + 2);
    fetch(i, next_key(i));
    fetch(i + 1, next_key(i + 1));
    const T* from = next_key(i + 2);
    if (warp_id() == 0) load_members(i);
#pragma unroll 1
    for (; i < chunks; ++i) {
      await_list(i + 3);
      if (warp_id() == 0) {
        await_members(work.members[i % 2]);
        load_members(i + 1);
      }
      ampere::wait_copies<1>();
      __syncthreads();  // and all have left the buffer that is filled next
      fetch(i + 2, from);
      from = next_key(i + 3);
      const int buffer = i % kBuffers;
      const uint32_t keys = shared_address(work.key[buffer]) + half_lane() * 8;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const Members here = work.members[i % 2][first_slot() + 2 * pair];
        if (!__any_sync(kAllLanes, here.any())) continue;
        float sum[4], by;
        weigh<T, 1>(sum, by, here, shared_address(work.gate[buffer]), 0, [&](uint32_t c) { return keys + c * kElements * 2; });
        if (!here.any()) continue;
        const bool used = bank.mass[pair] > 0.0f;
        const Move move(log_stay, used, by);
#pragma unroll
        for (int e = 0; e < 4; ++e) bank.k[pair][e] += move.rate * (sum[e] * move.share - bank.k[pair][e]);
        bank.mass[pair] = used ? bank.mass[pair] + by : by;
      }
      __syncwarp();
      write_snapshot();
    }
    ampere::wait_copies<0>();
    write(key(static_cast<float*>(p.new_summary_k), view.n), mass(static_cast<float*>(p.new_summary_mass), view.n), bank);
  }

  __device__ void load_state(Slots& bank) const {
    const float* from = key(static_cast<const float*>(p.state_summary_k), view.n);
    const float* from_mass = mass(static_cast<const float*>(p.state_summary_mass), view.n);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      bank.mass[pair] = real(pair) ? from_mass[2 * pair] : 0.0f;
      const bool read = real(pair) && (chunks == 0 || bank.mass[pair] > 0.0f);
#pragma unroll
      for (int e = 0; e < 4; ++e) bank.k[pair][e] = read ? from[2 * pair * p.dim + e] : 0.0f;
    }
  }
  __device__ void write(float* to_key, float* to_mass, const Slots& bank) const {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (!real(pair)) continue;
      const float* k = bank.k[pair];
      *reinterpret_cast<float4*>(to_key + 2 * pair * p.dim) = {k[0], k[1], k[2], k[3]};
      if (head == 0 && part == 0 && half_lane() == 0) to_mass[2 * pair] = bank.mass[pair];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kScanThreads, 2) summary_keys_kernel(BankScan p) {
  using Keys = SummaryKeys<T>;
  __shared__ __align__(128) typename Keys::Shared shared;
  let_next_start();
  follow_lists(p.lists);
  const int blocks = p.kv_heads * p.dim / kElements, n = static_cast<int>(blockIdx.x) / blocks;
  Keys(p, n, static_cast<int>(blockIdx.x) - n * blocks, shared).run();
  wait_for_stream();  // for the sake of the kernels that follow
}

}  // namespace

cudaError_t summary_keys(const BankScan& params, DType dtype, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.sequences * params.kv_heads * params.dim / kElements));
  const auto kernel = dtype == DType::kBFloat16 ? summary_keys_kernel<__nv_bfloat16> : summary_keys_kernel<__half>;
  return launch_early(kernel, grid, kScanThreads, 0, stream, params);
}

}  // namespace coda::kernels::sm90
