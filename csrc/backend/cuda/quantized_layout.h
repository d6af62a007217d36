// How quantized weights lie in device memory. A unit is 8 outputs × 64 inputs; units of the same outputs follow each
// other, so that a kernel which walks along the inputs reads memory from front to back:
//   data    [ceil(n / 8)][k_padded / 64][8 outputs][4][a word for each step]
//   scales  [ceil(n / 8)][k_padded / 64][8 outputs][2 groups]  float16; q4_1: (scale, minimum)
//           int8: [n] float32
// Word (output g, t) of a step of 16 inputs is what lane 4g + t gives the matrix instruction as its B: inputs 2t, 2t +
// 1, 2t + 8, 2t + 9 (simt.cuh). One of int8 and q8_0 has these as bytes of value + 128, for one step; one of q4_0 and
// q4_1 has nibbles for two steps, the GGUF group of 32 inputs: pair i = 2 · (step % 2) + (0 or 1) is bits 4i … 4i + 3
// and 16 + 4i … 16 + 4i + 3.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace fastserve::cuda {

constexpr int kSlab = 64;  // inputs that a kernel takes at once; kPad is a multiple
constexpr int kGroup = 32;
constexpr int kUnitOutputs = 8;

__host__ __device__ constexpr bool has_nibbles(WeightFormat format) {
  return format == WeightFormat::kQ4_0 || format == WeightFormat::kQ4_1;
}
__host__ __device__ constexpr int unit_bytes(WeightFormat format) { return has_nibbles(format) ? 256 : 512; }
// Of the scales of one unit; int8's belong to outputs and are elsewhere.
__host__ __device__ constexpr int unit_scale_bytes(WeightFormat format) {
  return format == WeightFormat::kInt8 ? 0 : format == WeightFormat::kQ4_1 ? 64 : 32;
}

// Where a quantized weight is: `bits` bits from bit `shift` of the byte or 32-bit word at `offset` on.
struct WeightPlace {
  int64_t offset;  // bytes
  int shift;
};
__host__ __device__ constexpr WeightPlace weight_place(WeightFormat format, int64_t k_padded, int64_t output,
                                                       int64_t input) {
  const int64_t unit = output / kUnitOutputs * (k_padded / kSlab) + input / kSlab;
  const int64_t g = output % kUnitOutputs;
  const int step = static_cast<int>(input % kSlab / 16), column = static_cast<int>(input % 16);
  const int t = column % 8 / 2, pair = column / 8, odd = column % 2;
  if (has_nibbles(format)) {
    return {unit * 256 + (g * 4 + t) * 8 + step / 2 * 4, (step % 2 * 2 + pair) * 4 + odd * 16};
  }
  return {unit * 512 + (g * 4 + t) * 16 + step * 4 + pair * 2 + odd, 0};
}
// Index of its group's scale, in float16s; a minimum follows its scale.
__host__ __device__ constexpr int64_t scale_place(WeightFormat format, int64_t k_padded, int64_t output,
                                                  int64_t input) {
  const int64_t unit = output / kUnitOutputs * (k_padded / kSlab) + input / kSlab;
  const int64_t index = (unit * kUnitOutputs + output % kUnitOutputs) * 2 + input % kSlab / kGroup;
  return format == WeightFormat::kQ4_1 ? index * 2 : index;
}

}  // namespace fastserve::cuda
