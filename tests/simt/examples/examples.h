// Kernels that only test the emulation: right ones, and ones with a mistake planted that it must find.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "backend/cuda/matrix_descriptor.h"
#include "common/dtype.h"

namespace fastserve::cuda {

// c = a + b
void example_add(DType dtype, const void* a, const void* b, void* c, int64_t count, cudaStream_t stream);

// collectives.cu: what one warp's operation gives, by its name; in and out are [32].
void example_collective(const std::string& name, const int32_t* in, int32_t* out, cudaStream_t stream);
// d [16, 8] += a [16, 16] · b [16, 8], loaded and stored by the documented fragments. With `swapped`, two registers of
// a's fragment are in each other's place.
void example_multiply(DType dtype, const uint16_t* a, const uint16_t* b, float* d, bool swapped, cudaStream_t stream);
// a [32, 8] → out [32, 4, 2]: what each lane gets of the four 8 × 8 matrices.
void example_load_matrices(const uint16_t* a, uint16_t* out, bool transposed, cudaStream_t stream);

// warpgroup.cu. Where an operand lies in the image of shared memory: from `offset` on, and every 16 inputs `step` bytes
// later.
struct OperandPlace {
  int offset, step;
  Swizzle swizzle;
  uint32_t leading, stride;  // bytes
};
// d [64, columns] += A · Bᵀ of operands [64, 16 · steps] and [columns, 16 · steps], right or with a mistake, by name.
void example_product(const std::string& how, DType dtype, int columns, const unsigned char* image, int bytes,
                     const OperandPlace& a, const OperandPlace& b, int steps, float* d, cudaStream_t stream);
// matrix [rows, 128] → out [tiles, 2, 16, 64]: rows [16 i, 16 i + 16) as each of two blocks gets them by copies; the
// last 8 of them are the block's own columns, the first 8 the first block's.
void example_copies(const std::string& how, const uint16_t* matrix, int rows, int tiles, uint16_t* out,
                    cudaStream_t stream);

// planted.cu: kernels with a mistake, or without it, by name. `data` has kPlantedCount elements.
constexpr int kPlantedCount = 256;
void example_planted(const std::string& name, float* data, cudaStream_t stream);
std::vector<std::string> planted_names();

}  // namespace fastserve::cuda
