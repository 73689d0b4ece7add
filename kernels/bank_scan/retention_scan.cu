#include "retention_segments.cuh"
#include "steps.h"

#include <algorithm>

namespace coda::kernels {

size_t retention_scan_workspace(const BankScanParams& params) {
  BankScanForward forward{};
  static_cast<BankScanParams&>(forward) = params;
  const RetentionScan scan(forward);
  const int64_t states = scan.sequences * scan.gate_groups, cuts = scan.segments * scan.gate_groups;
  return scan.bytes + std::max({workspace_part(retention_tokens_block(scan), states + cuts),
                                workspace_part(retention_banks_block(scan), states),
                                workspace_part(retention_walk_block(scan), cuts)});
}

cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream) {
  const RetentionScan scan(params);
  cudaError_t status = retention_tokens(scan, dtype, stream);
  if (status == cudaSuccess) status = retention_banks(scan, stream);
  if (status == cudaSuccess) status = retention_walk(scan, stream);
  if (status == cudaSuccess) status = retention_slots(scan, stream);
  if (status == cudaSuccess) status = retention_rows(scan, stream);
  return status;
}

}  // namespace coda::kernels
