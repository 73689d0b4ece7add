#pragma once

#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "params.h"

namespace coda::kernels {

size_t bank_scan_workspace(const BankScanParams& params, DType dtype);
cudaError_t bank_scan_forward(const BankScanForward& params, DType dtype, cudaStream_t stream);
cudaError_t bank_scan_backward(const BankScanBackward& params, DType dtype, cudaStream_t stream);

size_t route_exact_bank_workspace(const RouteExactBankParams& params, DType dtype);
cudaError_t route_exact_bank(const RouteExactBankParams& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels
