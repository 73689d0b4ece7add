#include "tensor_map.h"

namespace coda::kernels {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that nothing links to the driver, which a machine that only builds does not have.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const auto status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap& map, const void* base, DType dtype, const TensorMapShape& shape) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t bytes[4];
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i + 1 < shape.rank; ++i) {
    // The stride of a dimension of size 1 is never used, and may be anything.
    bytes[i] = shape.sizes[i + 1] > 1 ? static_cast<cuuint64_t>(shape.strides[i]) * 2 : 16;
  }
  const auto result = encode(&map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                             static_cast<cuuint32_t>(shape.rank), const_cast<void*>(base), shape.sizes, bytes, shape.box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE,
                             shape.box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace coda::kernels
