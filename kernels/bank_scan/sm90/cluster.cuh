#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "../../common/hopper.cuh"
#include "../../common/launch.cuh"

// Blocks of a cluster that pass numbers to each other's shared memory.
namespace coda::kernels::sm90 {

// The most shared memory of a block, less what barriers and the like take statically.
constexpr size_t kClusterShared = 226 * 1024;
constexpr int kClusterBlocks = 8;  // the most that every device of compute capability 9.0 grants; most grant twice as many

__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// In two halves, so that work which needs no other block can stand between. By all threads of a warp together.
__device__ inline void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where no memory is handed over but what fence_barrier_init has made visible: the full one waits until all writes have arrived.
__device__ inline void cluster_arrive_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// The address, in the shared memory of block `rank`, of what lies at `local` in this one's.
__device__ inline uint32_t remote_address(const void* local, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
  return address;
}
// Stores in another block; its bytes complete on that block's barrier, and who has waited on it sees them.
__device__ inline void send(uint32_t to, uint32_t word, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(word), "r"(barrier)
               : "memory");
}
__device__ inline void send(uint32_t to, float x, uint32_t barrier) { send(to, __float_as_uint(x), barrier); }
__device__ inline void send(uint32_t to, uint32_t x, uint32_t y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(x), "r"(y), "r"(barrier)
               : "memory");
}
__device__ inline void send(uint32_t to, float x, float y, uint32_t barrier) {
  send(to, __float_as_uint(x), __float_as_uint(y), barrier);
}
// 16 bytes, to a multiple of 16.
__device__ inline void send(uint32_t to, uint4 x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
               : "memory");
}
// Arrives on another block's barrier, and announces bytes that are on their way to that block.
__device__ inline void arrive_expect_remote(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// The same in all lanes, also to the compiler. A bulk copy by an elected thread, with addresses that are, is one instruction; by
// lanes it is a loop over them, of 110 cycles each.
__device__ inline uint32_t uniform(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }
// Many bytes at once to another block (compute-sanitizer accepts no other), both ends at multiples of 16; this thread's writes to
// `from`, in this block's shared memory, lie before a fence_async_proxy.
__device__ inline void send_bytes(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// A launch of clusters; `attribute` must outlive it.
inline cudaLaunchConfig_t cluster_config(cudaLaunchAttribute& attribute, int64_t clusters, int blocks, int threads, size_t shared,
                                         cudaStream_t stream) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}
template <class Params>
cudaError_t prepare_clusters(void (*kernel)(Params), int blocks, size_t shared) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  const auto status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess || blocks <= kClusterBlocks) return status;
  return cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// As launch_early, whose rules hold for the kernel.
template <class Params>
cudaError_t launch_clusters(void (*kernel)(Params), int64_t clusters, int blocks, int threads, size_t shared, cudaStream_t stream,
                            const Params& params) {
  if (clusters == 0) return cudaSuccess;
  if (const auto status = prepare_clusters(kernel, blocks, shared); status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{{}, early_attribute()};
  auto config = cluster_config(attributes[0], clusters, blocks, threads, shared, stream);
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, params);
}
// How many clusters the device has room for at once. The driver, which takes its time, is asked once for each shape.
template <class Params>
int most_clusters(void (*kernel)(Params), int blocks, int threads, size_t shared) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, size_t>, int> asked;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::lock_guard lock(mutex);
  const auto [at, fresh] = asked.try_emplace({device, reinterpret_cast<const void*>(kernel), blocks, threads, shared}, 0);
  if (fresh) {
    cudaLaunchAttribute attribute{};
    const auto config = cluster_config(attribute, 1, blocks, threads, shared, nullptr);
    const bool known = prepare_clusters(kernel, blocks, shared) == cudaSuccess &&
                       cudaOccupancyMaxActiveClusters(&at->second, kernel, &config) == cudaSuccess;
    if (!known) {
      at->second = 0;
      cudaGetLastError();  // not an error of the caller's
    }
  }
  return at->second;
}

}  // namespace coda::kernels::sm90
