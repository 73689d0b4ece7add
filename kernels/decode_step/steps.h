#pragma once

#include "launch.h"

namespace coda::kernels {

// Where the token opens a chunk, the banks take what leaves the ring; elsewhere blocks return at once.
cudaError_t update_banks(const DecodeStepParams& params, DType dtype, cudaStream_t stream);
// Attention over banks, ring and the new token, which is not in the ring yet.
cudaError_t attend_memory(const DecodeStepParams& params, DType dtype, cudaStream_t stream);
// The new token enters the ring.
cudaError_t write_ring(const DecodeStepParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
