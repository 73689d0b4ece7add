#pragma once

#include "launch.h"

namespace coda::kernels {

// The parts of a scan. The exact bank and the summary bank do not read each other. Retention writes the new state as well, the
// summaries' aside.
size_t retention_scan_workspace(const BankScanParams& params);
cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream);
size_t novelty_scan_workspace(const BankScanParams& params, DType dtype);
cudaError_t novelty_scan(const BankScanForward& params, DType dtype, cudaStream_t stream);
size_t summary_scan_workspace(const BankScanParams& params, DType dtype);
cudaError_t summary_scan(const BankScanForward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
