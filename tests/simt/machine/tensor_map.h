// What the emulated driver puts into a tensor map, whose 128 bytes are the driver's affair.
#pragma once

#include <cstdint>

namespace simt {

struct TensorMap {
  static constexpr uint64_t kMagic = 0x70616d20726f736e;
  uint64_t magic;
  const unsigned char* base;
  uint64_t columns, rows;  // of the matrix
  uint64_t pitch;          // bytes from row to row
  uint32_t box_columns, box_rows;
  uint32_t element_bytes;
  uint32_t swizzle_bytes;  // 0: none
};

}  // namespace simt
