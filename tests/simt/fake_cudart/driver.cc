// The driver's functions that the backend finds at run time.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

#include "fake_cudart/device.h"
#include "machine/tensor_map.h"

namespace {

// Matrices of 16-bit elements only. What the driver's manual asks of the arguments is asked here.
CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* extent, const cuuint64_t* pitch, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  constexpr uint64_t kMostExtent = uint64_t{1} << 32, kMostPitch = uint64_t{1} << 40;
  constexpr uint32_t kMostBox = 256, kBytes = 2;
  const bool known = rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && steps[0] == 1 && steps[1] == 1 &&
                     (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  if (!known) fake_cudart::error("cuTensorMapEncodeTiled: no such map is emulated");
  const uint32_t swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                            : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                            : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                                   : 0;
  for (int i = 0; i < 2; ++i) {
    if (extent[i] == 0 || extent[i] > kMostExtent || box[i] == 0 || box[i] > kMostBox) return CUDA_ERROR_INVALID_VALUE;
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || reinterpret_cast<uintptr_t>(map) % 64 != 0 ||
      pitch[0] % 16 != 0 || pitch[0] >= kMostPitch || box[0] * kBytes % 16 != 0 ||
      (swizzled > 0 && box[0] * kBytes > swizzled)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const simt::TensorMap tensor{simt::TensorMap::kMagic,
                               static_cast<const unsigned char*>(address),
                               extent[0],
                               extent[1],
                               pitch[0],
                               box[0],
                               box[1],
                               kBytes,
                               swizzled};
  static_assert(sizeof tensor <= sizeof *map);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &tensor, sizeof tensor);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int version,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&encode_tensor_map) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
