// Integer dot products in float32: sums of 32 products of bytes stay below 2^24, so every one of them is exact.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

constexpr int kQuantizedRows = 4;
constexpr bool kSignedBytes = false;  // whether dot() takes bytes for what they stand for (value - 128)
using Quant = float;
using Sum = F32;
using NibbleSum = Sum;
struct Bytes {
  F32 input[4];
};
using Nibbles = Bytes;

inline Sum start_sum(int32_t x) { return set1(static_cast<float>(x)); }
inline Words load_words(const uint8_t* p) {
  Words words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}
inline F32 convert(Words words) { return {__builtin_convertvector(reinterpret_cast<Ints>(words), Floats)}; }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the order of bytes in a word is taken to be little-endian"
#endif
inline Bytes load_bytes(const uint8_t* p) {
  const Words words = load_words(p);
  Bytes bytes;
  for (int i = 0; i < 4; ++i) bytes.input[i] = convert((words >> (8 * i)) & 255u);
  return bytes;
}
inline void load_nibbles(const uint8_t* p, Nibbles& low, Nibbles& high) {
  const Words words = load_words(p);
  for (int i = 0; i < 4; ++i) {
    low.input[i] = convert((words >> (8 * i)) & 15u);
    high.input[i] = convert((words >> (8 * i + 4)) & 15u);
  }
}
inline Sum dot(Sum sum, const Quant* a, const Bytes& w) {
  for (int i = 0; i < 4; ++i) sum = add(sum, mul(set1(a[i]), w.input[i]));
  return sum;
}
inline NibbleSum begin_nibbles(int32_t start) { return start_sum(start); }
inline Sum end_nibbles(NibbleSum sum, int32_t) { return sum; }
inline F32 to_f32(Sum sum) { return sum; }
inline F32 load_half(const uint8_t* p) {
  float lane[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, sizeof bits);
    lane[i] = half_to_float(bits);
  }
  return load(lane);
}
inline float group_max(F32 x) { return reduce_max(x); }
inline float group_sum(F32 x) { return reduce_add(x); }
inline void store_quants(Quant* p, F32 x) { store(p, x); }

}  // namespace fastserve::cpu::FS_ISA
