// What a feed-forward block puts its inner products through, the same in every kernel.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

// x · σ(v) = x / (1 + e^-v), by e^-|v|, which is never large: without branches, and without a division, for whose exact
// rounding a product's epilogue would have to wait. Off by 12 + 3 |v| parts in 2^24, and 2^-126 · x.
__device__ __forceinline__ float times_sigmoid(float x, float v) {
  const float power = exp2_fast(-fabsf(v) * 1.44269504f);
  return (v >= 0.0f ? x : x * power) * reciprocal_fast(1.0f + power);
}

template <Activation kKind>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kKind == Activation::kSilu) {
    return times_sigmoid(x, x);
  } else if constexpr (kKind == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
  } else if constexpr (kKind == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh u) = x · σ(2u), u = √(2/π) (x + 0.044715 x³)
    return times_sigmoid(x, 2.0f * 0.7978845608f * x * fmaf(x * x, 0.044715f, 1.0f));
  } else {
    return fmaxf(x, 0.0f);
  }
}

}  // namespace fastserve::cuda
