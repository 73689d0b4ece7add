#include "retention_segments.cuh"
#include "sm90/steps.h"
#include "steps.h"

namespace coda::kernels {

size_t retention_scan_workspace(const BankScanParams& params) {
  BankScanForward forward{};
  static_cast<BankScanParams&>(forward) = params;
  const RetentionScan scan(forward);
  return scan.bytes +
         std::max({retention_tokens_workspace(scan), retention_walk_workspace(scan), retention_rows_workspace(scan)});
}

cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  if (device_capability() == 90 && sm90::retention_served(params, dtype)) return sm90::retention_scan(params, dtype, stream);
  const RetentionScan scan(params);
  cudaError_t status = retention_tokens(scan, dtype, stream);
  if (status == cudaSuccess) status = retention_walk(scan, stream);
  if (status == cudaSuccess) status = retention_rows(scan, dtype, stream);
  return status;
}

}  // namespace coda::kernels
