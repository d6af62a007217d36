#include "backend/cuda/tensor_map.h"

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Found at run time: the library must load where the driver is older, and where there is none.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kVersion = 12000;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &result));
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  FS_CHECK(found != nullptr, "the driver has no tensor maps");
  return found;
}

}  // namespace

CUtensorMap tensor_map(DType dtype, const void* data, const MatrixExtent& matrix, const BoxExtent& box) {
  const cuuint64_t extent[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(matrix.pitch) * 2};  // bytes
  const cuuint32_t boxes[] = {static_cast<cuuint32_t>(box.columns), static_cast<cuuint32_t>(box.rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                const_cast<void*>(data), extent, pitch, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FS_CHECK(status == CUDA_SUCCESS, "CUDA: no tensor map of a matrix [", matrix.rows, ", ", matrix.columns,
           "] whose rows are ", matrix.pitch, " elements apart: error ", static_cast<int>(status));
  return map;
}

}  // namespace fastserve::cuda
