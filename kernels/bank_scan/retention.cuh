#pragma once

#include "../common/similarity.cuh"
#include "../common/workspace.cuh"

namespace coda::kernels {

// z + rho * p, the product rounded before the sum, so that every device orders alike (semantics 3.3). NaN ranks last: unordered
// keys would give two tokens one rank.
__device__ inline double retention_key(double logit, double age_decay, int64_t position) {
  const double key = add_rn(logit, mul_rn(age_decay, static_cast<double>(position)));
  return isnan(key) ? neg_inf<double>() : key;
}

// The exact bank of one gate group and what is offered to it, one eviction at a time: a decode step. The scan has no walk.
struct RetentionBank {
  double* key;         // (Me)
  int64_t* position;   // (Me), -1 free
  int* rank;           // (Me) held tokens that outrank this one; sinks take no part
  int* source;         // (Me) flat source
  double* offered;     // (C) keys of the candidates
  int* offered_rank;   // (C)
  int* list;           // (Me)

  __host__ __device__ RetentionBank(Carver& carver, int slots, int chunk)
      : key(carver.take<double>(slots)), position(carver.take<int64_t>(slots)), rank(carver.take<int>(slots)),
        source(carver.take<int>(slots)), offered(carver.take<double>(chunk)), offered_rank(carver.take<int>(chunk)),
        list(carver.take<int>(slots)) {}
};

__device__ inline bool outranks(double key_a, int64_t position_a, double key_b, int64_t position_b) {
  return key_a > key_b || (key_a == key_b && position_a > position_b);
}

// Ranks of a bank whose keys and positions are set. The whole block; ends with a barrier.
__device__ inline void rank_bank(const RetentionBank& bank, int slots, int sinks) {
  __syncthreads();
  for (int j = sinks + threadIdx.x; j < slots; j += blockDim.x) {
    int rank = 0;
    for (int i = sinks; i < slots; ++i) {
      rank += bank.position[i] >= 0 && outranks(bank.key[i], bank.position[i], bank.key[j], bank.position[j]);
    }
    bank.rank[j] = rank;
  }
  __syncthreads();
}

// Offers bank.offered[0 .. count), the tokens at positions first, first + 1, ...; the best stay, each held token in its slot.
// source_of(position) is a token's flat source. Returns, in the first warp, how many came in. The whole block; ends with a barrier.
template <class SourceOf>
__device__ inline int offer_tokens(const RetentionBank& bank, int slots, int sinks, int64_t first, int count,
                                   SourceOf source_of) {
  const int capacity = slots - sinks;
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    int rank = 0;
    for (int j = sinks; j < slots; ++j) {
      rank += bank.position[j] >= 0 && outranks(bank.key[j], bank.position[j], bank.offered[c], first + c);
    }
    for (int i = 0; i < count; ++i) rank += outranks(bank.offered[i], first + i, bank.offered[c], first + c);
    bank.offered_rank[c] = rank;
  }
  for (int j = sinks + threadIdx.x; j < slots; j += blockDim.x) {
    int rank = bank.rank[j];
    for (int c = 0; c < count; ++c) rank += outranks(bank.offered[c], first + c, bank.key[j], bank.position[j]);
    bank.rank[j] = rank;
  }
  __syncthreads();
  for (int j = sinks + threadIdx.x; j < slots; j += blockDim.x) {
    if (bank.rank[j] >= capacity) bank.position[j] = -1;
  }
  __syncthreads();
  int inserted = 0;
  if (warp_id() == 0) {
    compact(bank.list, capacity, [&](int j) { return bank.position[sinks + j] < 0; });
    for (int base = 0; base < count; base += kWarp) {
      const int c = base + lane_id();
      const bool enters = c < count && bank.offered_rank[c] < capacity;
      const unsigned mask = __ballot_sync(kAllLanes, enters);
      if (enters) {
        const int slot = sinks + bank.list[inserted + __popc(mask & ((1u << lane_id()) - 1))];
        bank.key[slot] = bank.offered[c];
        bank.position[slot] = first + c;
        bank.rank[slot] = bank.offered_rank[c];
        bank.source[slot] = source_of(first + c);
      }
      inserted += __popc(mask);
    }
  }
  __syncthreads();
  return inserted;
}

}  // namespace coda::kernels
