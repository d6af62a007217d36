// Rotary position embedding of one head, half-split layout: (x[i], x[i + half]) is turned by the token's angle i.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

// cos_sin: [2][half]
inline void rotate(float* head, const float* cos_sin, int64_t half) {
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const F32 a = load(head + i), b = load(head + half + i);
    const F32 c = load(cos + i), s = load(sin + i);
    store(head + i, sub(mul(a, c), mul(b, s)));
    store(head + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

}  // namespace fastserve::cpu::FS_ISA
