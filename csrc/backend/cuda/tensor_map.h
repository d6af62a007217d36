// What the copy engine of compute capability 9.0 is told of a matrix whose tiles it copies (hopper.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/dtype.h"

namespace fastserve::cuda {

struct MatrixExtent {
  int64_t rows, columns, pitch;  // elements from row to row
};
struct BoxExtent {
  int rows, columns;
};

// Of 16-bit elements in device memory: a copy brings a box of them, whose rows are 128 bytes and swizzled over 128
// bytes in shared memory; what is outside the matrix is zero. Throws where the driver does not know of such, or refuses
// it.
CUtensorMap tensor_map(DType dtype, const void* data, const MatrixExtent& matrix, const BoxExtent& box);

}  // namespace fastserve::cuda
