// Matrix instructions of a whole warp, by PTX's layout of fragments.
#pragma once

#include <bit>
#include <cstdint>

#include "common/dtype.h"
#include "machine/machine.h"

namespace simt {

enum class Element { kBf16, kHalf };

// d += A [16, 16] · B [16, 8]. A product of two 16-bit elements is exact; the sums are float32 and go over k in
// ascending order. (Hardware sums the 16 products in a way of its own, without rounding each: results differ in the
// last places. Kernels may only assume that an element of d depends on nothing but its row of A, its column of B and
// itself.)
void multiply(Element element, float* d, const uint32_t* a, const uint32_t* b, const Site& site);

// Four 8 × 8 matrices of 16-bit elements from shared memory.
void load_matrices(uint32_t* r, const void* row, bool transposed, const Site& site);

}  // namespace simt
