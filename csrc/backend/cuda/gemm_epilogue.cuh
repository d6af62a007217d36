// What becomes of a product's sums, the same in every kernel: parts in ascending order, int8's scale, bias, what the
// output held.
#pragma once

#include "backend/cuda/kernels.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

// The slab of 64 inputs at which a part begins. Depends on k alone.
__device__ __forceinline__ int part_begin(int slabs, int part) { return slabs * part / kGemmParts; }

template <bool kScaled>
__device__ __forceinline__ float scaled_and_biased(const GemmCall& call, int64_t column, float sum) {
  if constexpr (kScaled) sum *= static_cast<const float*>(call.weight.scales)[column];
  return call.bias == nullptr ? sum : sum + call.bias[column];
}

// Writes one output.
template <class T, bool kScaled>
__device__ __forceinline__ void put(const GemmCall& call, int64_t row, int64_t column, float sum) {
  const float value = scaled_and_biased<kScaled>(call, column, sum);
  const int64_t index = row * call.ld_output + column;
  if (call.wide) {
    float* output = static_cast<float*>(call.output) + index;
    *output = call.accumulate ? *output + value : value;
  } else {
    static_cast<T*>(call.output)[index] = narrow<T>(value);
  }
}

// Writes 8 neighbouring outputs from a column on that is a multiple of 8, or as many as there are.
template <class T, bool kScaled>
__device__ __forceinline__ void put_eight(const GemmCall& call, int64_t row, int64_t column, float (&sums)[8]) {
  if (column + 8 > call.weight.n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < call.weight.n) put<T, kScaled>(call, row, column + i, sums[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = scaled_and_biased<kScaled>(call, column + i, sums[i]);
  const int64_t index = row * call.ld_output + column;
  if (call.wide) {
    auto* output = reinterpret_cast<float4*>(static_cast<float*>(call.output) + index);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float4 value = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
      if (call.accumulate) {
        const float4 old = output[i];
        value = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
      }
      output[i] = value;
    }
  } else {
    *reinterpret_cast<uint4*>(static_cast<T*>(call.output) + index) = {
        pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]), pack<T>(sums[4], sums[5]), pack<T>(sums[6], sums[7])};
  }
}

// Writes the sums of a warp, in matrix fragments of four tiles of 8 columns: rows [row, row + 16), columns from
// `column` on. Each lane has 2 columns of each tile; four lanes exchange them so that each has a whole row of one tile,
// and writes are of whole vectors.
template <class T, bool kScaled>
__device__ __forceinline__ void put_tiles(const GemmCall& call, int64_t row, int64_t column, const float* sums,
                                          int lane) {
  row += lane / 4;
  column += lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = sums[i / 2 * 4 + half * 2 + i % 2];
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = (lane & bit) != 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((i / 2 & bit) != 0) continue;
        const float given = __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + 2 * bit], bit);
        x[i] = upper ? given : x[i];
        x[i + 2 * bit] = upper ? x[i + 2 * bit] : given;
      }
    }
    const int64_t at = row + half * 8;
    if (at < call.m && column < call.weight.n) put_eight<T, kScaled>(call, at, column, x);
  }
}

}  // namespace fastserve::cuda
