#pragma once

#include "launch.h"

namespace coda::kernels::sm90 {

// bounded_attention_prepare without the index, which the scan may still be writing: turns every key that may come into the bank.
// Where those are more than fit beside the scan's last kernel, it pays to turn only what does come.
bool prepares_ahead(const BoundedAttentionPrepare& params, DType dtype);
cudaError_t prepare_ahead(const BoundedAttentionPrepare& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm90
