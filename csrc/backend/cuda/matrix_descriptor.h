// How matrix instructions of warpgroups find an operand in shared memory (PTX ISA, "Matrix Descriptor Format").
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastserve::cuda {

// Chunks of 16 bytes of neighbouring rows are permuted over rows so wide.
enum class Swizzle : uint64_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// Of a matrix of 16-bit elements whose rows run along k; `address` is in shared memory, and all are multiples of 16.
// `stride`: bytes from 8 rows to the next 8. `leading`: bytes from 8 elements to the next 8 along k where nothing is
// swizzled, else not used. The swizzle's pattern begins at a multiple of 8 rows' bytes; a later step along k begins so
// many bytes later.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, Swizzle swizzle, uint32_t leading,
                                                         uint32_t stride) {
  constexpr uint64_t kField = 0x3fff;
  return (address >> 4 & kField) | (leading >> 4 & kField) << 16 | (stride >> 4 & kField) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace fastserve::cuda
