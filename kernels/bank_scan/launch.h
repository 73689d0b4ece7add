#pragma once

#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "params.h"

namespace coda::kernels {

size_t bank_scan_workspace(const BankScanParams& params, DType dtype);
// What starts early behind the scan, before it has ended, finds all that was there before the scan: its last kernel lets the next
// one start only when that has ended (launch_early).
cudaError_t bank_scan_forward(const BankScanForward& params, DType dtype, cudaStream_t stream);
// The same in two parts. Where the first has not `copied` what the new state holds as well, the second does so later in the
// stream, the workspace still untouched; behind the attention, what starts knows that the scan has ended, and waits for nothing
// more.
cudaError_t bank_scan_snapshots(const BankScanForward& params, DType dtype, cudaStream_t stream, bool& copied);
cudaError_t bank_scan_new_state(const BankScanForward& params, DType dtype, cudaStream_t stream, bool behind_attention);
cudaError_t bank_scan_backward(const BankScanBackward& params, DType dtype, cudaStream_t stream);

size_t route_exact_bank_workspace(const RouteExactBankParams& params, DType dtype);
cudaError_t route_exact_bank(const RouteExactBankParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
