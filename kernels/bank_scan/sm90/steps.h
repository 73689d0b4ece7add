#pragma once

#include "../launch.h"

// The paper's policy on compute capability 9.0 alone, bfloat16 and float16: clusters of blocks, one for each sequence. The choices
// say which shapes fit; the others go to the kernels beside this folder, which serve everything.
namespace coda::kernels::sm90 {

bool serves(const RouteExactBankParams& params, DType dtype);
cudaError_t route_exact_bank(const RouteExactBankParams& params, DType dtype, cudaStream_t stream);

// Which banks of a scan run here.
struct Banks {
  bool exact, summary;
  explicit operator bool() const { return exact || summary; }
};
Banks banks_served(const BankScanParams& params, DType dtype);
size_t scan_banks_workspace(const BankScanParams& params, Banks banks);
// Sets `copied` where it writes the new state as well, and leaves it else.
cudaError_t scan_banks(const BankScanForward& params, DType dtype, Banks banks, bool& copied, cudaStream_t stream);

// The retention scan of few tokens, any storage type; `retention_served` says which shapes.
bool retention_served(const BankScanForward& params, DType dtype);
cudaError_t retention_scan(const BankScanForward& params, DType dtype, cudaStream_t stream);

}  // namespace coda::kernels::sm90
