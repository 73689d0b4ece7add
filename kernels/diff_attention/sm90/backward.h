#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../../common/dtype.h"
#include "../params.h"

// What the kernels of this path's backward share: queries_before, key blocks, queries_after, in this order.
namespace coda::kernels::sm90 {

constexpr int kQueryTile = 64;
constexpr int kKeyBlock = 128;

// Numbers of a query tile, each for its 64 queries. Shifts are what logits q . k begin with: -lse / scale, and with the second stream
// log |lambda| / scale besides, so that its weights come out as |lambda| P2. Then -D1; D1 - D2; and signs, by sign_slot.
enum QueryNumber { kShift1, kNegativeDelta1, kShift2, kDeltaChange, kSigns };
constexpr int query_numbers(int streams) { return streams == 2 ? 5 : 2; }

// Where a tile keeps the number of query c: in the order in which a thread of a warpgroup, whose accumulators' columns are
// queries, needs them, four at a time.
constexpr int number_slot(int c) { return c / 16 * 16 + c % 8 / 2 * 4 + c % 16 / 8 * 2 + c % 2; }

// Where it keeps the word whose two sign bits turn |lambda| P2 of queries c and c + 1, c even, into -lambda P2.
constexpr int sign_slot(int c) { return c % 8 / 2 * 8 + c / 8; }

// Tiles count over all sequences: sequence n of a dense batch begins at tile n * ceil(length_q / 64), of a packed one at tile
// cu_seqlens_q[n] / 64 + n, and has no tile in common with another.
struct BackwardArguments : DiffAttentionBackward {
  int64_t tiles;        // of one head
  float log2_scale;     // scale * log2(e)
  unsigned section;     // units of a section: see find_block
  // Parts of the workspace; T is the storage type.
  float* angles;        // (H, D/64 panels, 4, 4, 2) {cos, sin} of theta, null with one stream: see panel_pair
  float* numbers;       // (H, tiles, query_numbers, 64)
  float* grad_q_sums;   // (H, tiles, D/64 panels, 8, 128, 4), not yet scaled: registers of a warpgroup whose rows are queries
  void* turned_q;       // R_theta q as rounded to T, null with one stream: (Tq, H, D), in a packed batch (tiles * 64, H, D)
  void* tiled_q;        // (tiles * 64, H, D) T of a packed batch, zero after each sequence's end; null in a dense one
  void* tiled_grad;     // likewise, of grad_diff

  CUtensorMap q_map, turned_q_map, grad_map;  // boxes of 64 columns by 64 queries
  CUtensorMap k_map;                          // 32 columns by 128 keys
  CUtensorMap v_map;                          // 64 columns by 128 keys
};

// A panel of grad_q is 64 columns that hold both dimensions of each pair, whichever way theta pairs them: 32 from 32 * panel
// on, and 32 from D/2 + 32 * panel on. As accumulators of a warpgroup, column 8 j + c of the panel (j < 8, c < 8) is this one
// of D.
constexpr int panel_column(int dim, int panel, int j, int c) { return j / 4 * (dim / 2) + panel * 32 + j % 4 * 8 + c; }

// The eight pairs of a thread in a panel are numbered by j < 4 and m < 2. `quad` is the thread's number modulo 4.
constexpr int panel_pair(int dim, bool interleaved, int panel, int quad, int j, int m) {
  return interleaved ? panel_column(dim, panel, 4 * m + j, 2 * quad) / 2 : panel_column(dim, panel, j, 2 * quad + m);
}

cudaError_t queries_before(const BackwardArguments& p, DType dtype, cudaStream_t stream);
cudaError_t queries_after(const BackwardArguments& p, DType dtype, cudaStream_t stream);

cudaError_t key_blocks_d64_bf16(const BackwardArguments& p, cudaStream_t stream);
cudaError_t key_blocks_d64_fp16(const BackwardArguments& p, cudaStream_t stream);
cudaError_t key_blocks_d128_bf16(const BackwardArguments& p, cudaStream_t stream);
cudaError_t key_blocks_d128_fp16(const BackwardArguments& p, cudaStream_t stream);

}  // namespace coda::kernels::sm90
