// Rounding a row of numbers to integers with a scale of its own.
#pragma once

#include <cstdint>

namespace fastserve::cpu {

// Calls put(i, x[i] / scale, rounded to an integer) for 0 <= i < n and returns the scale, with which the largest
// becomes `limit`, 2^15 at most. Where x holds a NaN or an infinity the scale is one too, and the integers are
// anything. Inlined always, because kernels compiled for different instruction sets share it.
template <class Put>
[[gnu::always_inline]] inline float round_row(const float* x, int64_t n, float limit, Put put) {
  int32_t largest = 0;  // as bits, which order magnitudes, infinities and NaNs last
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float maximum = __builtin_bit_cast(float, largest);
  const bool ordinary = maximum > 0x1p-100f && largest < 0x7f800000;  // what is smaller counts as zero
  const float inverse = ordinary ? limit / maximum : 0.0f;
  // Adding 1.5 · 2^23 leaves no room for a fraction: the integer is in the low bits.
  const int32_t shift = __builtin_bit_cast(int32_t, 12582912.0f);
  for (int64_t i = 0; i < n; ++i) put(i, __builtin_bit_cast(int32_t, x[i] * inverse + 12582912.0f) - shift);
  return maximum / limit;
}

}  // namespace fastserve::cpu
