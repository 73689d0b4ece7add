#include "fill.h"

#include "launch.cuh"

namespace coda::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kPacketBytes = 16, kPackets = 4;  // of a thread
constexpr int kBlockBytes = kThreads * kPackets * kPacketBytes;

__global__ void __launch_bounds__(kThreads) fill_kernel(FillParams p) {
  wait_for_stream();
  let_next_start();
  const int64_t block = blockIdx.x;
  int i = 0;
  while (i + 1 < p.count && block >= p.piece[i + 1].blocks) ++i;
  const auto& piece = p.piece[i];
  const uint4 packet{piece.word, piece.word, piece.word, piece.word};
  const int64_t packets = piece.bytes / kPacketBytes;
  const int64_t first = (block - piece.blocks) * kThreads * kPackets + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kPackets; ++j) {
    const int64_t at = first + j * kThreads;
    if (at < packets) static_cast<uint4*>(piece.to)[at] = packet;
  }
  const int64_t words = piece.bytes / 4, tail = packets * 4 + threadIdx.x;
  if (block == piece.blocks && tail < words) static_cast<uint32_t*>(piece.to)[tail] = piece.word;
}

}  // namespace

cudaError_t fill(const FillParams& params, cudaStream_t stream) {
  FillParams p = params;
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    p.piece[i].blocks = blocks;
    blocks += (p.piece[i].bytes + kBlockBytes - 1) / kBlockBytes;
  }
  return launch_early(fill_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}

}  // namespace coda::kernels
