#include "retention_group.cuh"
#include "steps.h"

// The retention scan of few tokens in one launch: a cluster for each sequence and gate group, whose blocks share the chunks in
// which something leaves the ring (README.md). Identities are those of retention_segments.cuh; chunks are counted from the first
// of those.
namespace coda::kernels::sm90 {
namespace {

using namespace retention;

constexpr int64_t kMostTokens = 4096;
constexpr int kCountBits = 24;         // of a sequence's arrivals; above them, how many groups have counted

// From the stays of a block's own entries to the rows of its chunks.
template <class T>
__device__ inline void hand_over(const GroupScan<T>& scan) {
  const RetentionClusters& p = scan.p;
  const int mine = threadIdx.x;
  __syncthreads();
  scan.send_stays();
  if (mine < kWarp) {
    int count = 0;
    for (int w = mine; w < p.words; w += kWarp) count += __popc(scan.at(&Memory::arrives)[w]);
    count = __reduce_add_sync(kAllLanes, count);
    if (mine == 0) {
      send(remote_address(scan.at(&Memory::arrived) + scan.block, 0), static_cast<uint32_t>(count),
           remote_address(scan.at(&Memory::stays), 0));
    }
  }
  scan.clear_strip();
  scan.write_idle_rows();
  __syncthreads();
  wait(scan.at(&Memory::stays), 0);
  scan.write_rows();
}

template <class T>
__device__ inline void scan_group(const RetentionClusters& p, int number, unsigned char* shared) {
  using A = acc_t<T>;
  const int n = p.gate_groups == 1 ? number : number / p.gate_groups, group = number - n * p.gate_groups;
  const int slots = p.exact_slots, sinks = p.num_sinks, mine = threadIdx.x;
  // All at once: what the slots hold, frequencies, and where the sequence stands.
  const int64_t* positions = p.exact_pos + static_cast<int64_t>(number) * slots;
  const A* gates = static_cast<const A*>(p.state_gate) + static_cast<int64_t>(number) * (p.window + slots) + p.window;
  const int64_t first_position = mine < slots ? positions[mine] : -1;
  const A first_gate = mine < slots ? gates[mine] : A(0);
  const double first_frequency = mine < p.dim / 2 && p.has_bank_distance ? p.inv_freq[mine] : 0.0;
  const auto sequence = SequencePlan::of(p, n);
  const GroupScan<T> scan(p, shared, sequence, group);
  const A first_logit = mine < scan.tokens && scan.offered(mine) ? scan.logit(mine) : A(0);
  bool held = false;  // anything beside the sinks
#pragma unroll 1
  for (int j = mine; j < slots; j += kThreads) {
    const int64_t position = j == mine ? first_position : positions[j];
    const A gate = j == mine ? first_gate : gates[j];
    scan.at(&Memory::at_first)[j] = position < 0 ? -1 : p.window + j;
    // Arrivals take the slots of the last ranks: free ones fill in ascending order.
    if (j >= sinks) {
      held |= position >= 0;
      scan.at(&Memory::entry)[j - sinks] = position < 0
                                               ? CarriedEntry{kFreeSlot, j}
                                               : CarriedEntry{ordered_key(retention_key(gate, p.age_decay, position)), position};
    }
  }
#pragma unroll 1
  for (int i = mine; i <= p.words; i += kThreads) scan.at(&Memory::arrives)[i] = 0;
#pragma unroll 1
  for (int l = warp_id(); l < kBlocks; l += kWarps) {
#pragma unroll 1
    for (int i = scan.padded + lane_id(); i < p.stride; i += kWarp) scan.at(&Memory::code)[l * p.stride + i] = 0;
  }
#pragma unroll 1
  for (int i = mine; i < 2 * p.carried_stride; i += kThreads) {
    const int in = i < p.carried_stride ? i : i - p.carried_stride,
              end = i < p.carried_stride ? (p.capacity + 1) / 2 : p.capacity / 2;
    if (in >= end) scan.at(&Memory::carried_code)[i] = 0;
  }
#pragma unroll 1
  for (int i = mine; i < (p.has_bank_distance ? p.dim / 2 : 0); i += kThreads) {
    scan.at(&Memory::inv_freq)[i] = i == mine ? first_frequency : p.inv_freq[i];
  }
  cluster_wait();
  const bool carries = __syncthreads_or(held);
  if (mine == 0) {
    const int others = (kBlocks - 1) * scan.padded, carried = carries ? p.capacity - scan.carried() : 0;
    arrive_expect(scan.at(&Memory::codes), (others + carried) * 4);
    arrive_expect(scan.at(&Memory::sets), (kBlocks - 1) * scan.chunks * ((scan.padded / kWarp + 1) / 2) * 16);
    arrive_expect(scan.at(&Memory::keys), (others + carried) * 8);
    arrive_expect(scan.at(&Memory::stays), (p.capacity + scan.carried()) * 8 + (scan.block == 0 ? kBlocks * 4 : 0));
  }
  if (carries) {
    scan.rank_carried();
  } else {
    scan.rank_free();
  }
#pragma unroll 1
  for (int c = mine; c < scan.padded; c += kThreads) {
    uint64_t key = c < scan.tokens ? kNotOffered : 0;
    uint32_t code = c < scan.tokens ? kNotOfferedCode + c : c - scan.tokens;
    if (scan.offered(c)) {
      const double exact = retention_key(c == mine ? first_logit : scan.logit(c), p.age_decay, scan.position(c));
      key = ordered_key(exact);
      code = code_of(exact);
    }
    scan.at(&Memory::raw_key)[c] = key;
    scan.at(&Memory::raw_code)[c] = code;
  }
  scan.sort();
  scan.send_all(scan.at(&Memory::code) + scan.block * p.stride, scan.padded / 4, scan.at(&Memory::codes), kWarps - kBlocks + 1);
  scan.send_sets();
  scan.send_all(scan.at(&Memory::key) + scan.block * p.most_tokens, scan.padded / 2, scan.at(&Memory::keys),
                kWarps - kBlocks + 1);
  __syncthreads();
  wait(scan.at(&Memory::codes), 0);
  // Twice, so that the code of the copies has been fetched when all wait for it.
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if (turn > 0) hand_over(scan);
    scan.write_exact_slots(turn > 0);
    if (turn == 0) scan.find_stays();
  }
  wait(scan.at(&Memory::keys), 0);
  if (scan.block == 0 && mine == 0) {
    const int64_t pinned = min(sequence.last_end(p), static_cast<int64_t>(sinks)) - sequence.evicted;
    int count = pinned > 0 ? static_cast<int>(pinned) : 0;
    for (int i = 0; i < kBlocks; ++i) count += scan.at(&Memory::arrived)[i];
    if (p.gate_groups > 1) {
      const int before = atomicAdd(p.arrived + n, count + (1 << kCountBits));
      count += before & ((1 << kCountBits) - 1);
      if (before >> kCountBits < p.gate_groups - 1) return;
    }
    write_counts(p, n, count, 0);
  }
}

// The first blocks scan, the others copy the ring into the new state.
template <class T>
__global__ void __launch_bounds__(kThreads) retention_clusters_kernel(RetentionClusters p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int scans = static_cast<int>(p.sequences) * p.gate_groups * kBlocks, block = static_cast<int>(blockIdx.x);
  if (block >= scans) {
    wait_for_stream();
    let_next_start();
    if (block - scans < p.ring) copy_ring_part<T>(p, block - scans, p.copied, p.wide);
    return;
  }
  if (threadIdx.x == 0) {
    const auto barrier = [&](uint64_t* offset) { return reinterpret_cast<uint64_t*>(shared + reinterpret_cast<size_t>(offset)); };
    init_barrier(barrier(p.memory.codes), 1);
    init_barrier(barrier(p.memory.sets), 1);
    init_barrier(barrier(p.memory.keys), 1);
    init_barrier(barrier(p.memory.stays), kBlocks * kWarps + 1);
    fence_barrier_init();
  }
  cluster_arrive_relaxed();
  // Memory that others may still write comes no nearer than the cache that all share.
  const int line = 128 * (block * kThreads + static_cast<int>(threadIdx.x));
  if (line < static_cast<int>(p.tokens) * p.gate_groups * static_cast<int>(sizeof(acc_t<T>))) {
    fetch_line(static_cast<const char*>(p.gate) + line);
  }
  wait_for_stream();
  let_next_start();
  scan_group<T>(p, block / kBlocks, shared);
}

// Before it: nothing has been counted.
__global__ void retention_begin_kernel(RetentionClusters p) {
  let_next_start();
  wait_for_stream();
  for (int n = threadIdx.x; n < p.sequences; n += blockDim.x) p.arrived[n] = 0;
}

// Blocks of clusters for the ring.
int64_t ring_clusters(const RetentionClusters& p) { return (p.ring + kBlocks - 1) / kBlocks; }

template <class T>
bool fit(const RetentionClusters& p) {
  return p.tokens <= kMostTokens && p.gate_groups == p.kv_heads && p.shared <= kClusterShared &&
         most_clusters(retention_clusters_kernel<T>, kBlocks, kThreads, p.shared) >= p.sequences * p.gate_groups;
}

}  // namespace

bool retention_served(const BankScanForward& params, DType dtype) {
  const RetentionClusters p(params);
  return dispatch(dtype, [&](auto zero) { return fit<decltype(zero)>(p) ? cudaSuccess : cudaErrorNotSupported; }) == cudaSuccess;
}

cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  RetentionClusters p(params);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    p.wide = wide_rows<T>(p);
    if (p.gate_groups > 1) {
      const auto status = launch_early(retention_begin_kernel, dim3(1), kWarp, 0, stream, p);
      if (status != cudaSuccess) return status;
    }
    return launch_clusters(retention_clusters_kernel<T>, p.sequences * p.gate_groups + ring_clusters(p), kBlocks, kThreads,
                           p.shared, stream, p);
  });
}

}  // namespace coda::kernels::sm90
