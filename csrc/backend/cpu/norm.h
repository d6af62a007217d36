// RMS norm and layer norm of one row.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

inline float sum(const float* x, int64_t width) {
  F32 total = set1(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) total = add(total, load(x + i));
  float result = reduce_add(total);
  for (; i < width; ++i) result += x[i];
  return result;
}

// Σ (x - center)²
inline float sum_squares(const float* x, float center, int64_t width) {
  F32 total = set1(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    const F32 d = sub(load(x + i), set1(center));
    total = fma(d, d, total);
  }
  float result = reduce_add(total);
  for (; i < width; ++i) {
    const float d = x[i] - center;
    result += d * d;
  }
  return result;
}

inline void rms_norm(const float* x, const float* weight, float* y, int64_t width, float eps) {
  const float inverse = 1.0f / __builtin_sqrtf(sum_squares(x, 0.0f, width) / static_cast<float>(width) + eps);
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) store(y + i, mul(mul(load(x + i), set1(inverse)), load(weight + i)));
  for (; i < width; ++i) y[i] = x[i] * inverse * weight[i];
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps) {
  const float mean = sum(x, width) / static_cast<float>(width);
  const float inverse = 1.0f / __builtin_sqrtf(sum_squares(x, mean, width) / static_cast<float>(width) + eps);
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    const F32 normal = mul(sub(load(x + i), set1(mean)), set1(inverse));
    store(y + i, fma(normal, load(weight + i), load(bias + i)));
  }
  for (; i < width; ++i) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

}  // namespace fastserve::cpu::FS_ISA
