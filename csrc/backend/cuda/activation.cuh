// What a feed-forward block puts its inner products through, the same in every kernel.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

template <Activation kKind>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kKind == Activation::kSilu) {
    return x / (1.0f + expf(-x));
  } else if constexpr (kKind == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
  } else if constexpr (kKind == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh u) = x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
    const float u = 0.7978845608f * x * fmaf(x * x, 0.044715f, 1.0f);
    return x / (1.0f + expf(-2.0f * u));
  } else {
    return fmaxf(x, 0.0f);
  }
}

}  // namespace fastserve::cuda
