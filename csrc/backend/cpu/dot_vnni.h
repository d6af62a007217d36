// Integer dot products with AVX-512 VNNI: vpdpbusd multiplies four unsigned by four signed bytes and adds to int32.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

constexpr int kQuantizedRows = 6;
constexpr bool kSignedBytes = false;  // whether dot() takes bytes for what they stand for (value - 128)
using Quant = int8_t;
struct Sum {
  __m512i v;
};
using NibbleSum = Sum;
struct Bytes {
  __m512i v;
};
using Nibbles = Bytes;

inline Sum start_sum(int32_t x) { return {_mm512_set1_epi32(x)}; }
// Loads into a register that stays one: else GCC loads again for every row, and there are as many loads a cycle as
// dots.
inline __m512i load_once(const uint8_t* p) {
  __m512i bytes = _mm512_loadu_si512(p);
  asm("" : "+v"(bytes));
  return bytes;
}
inline Bytes load_bytes(const uint8_t* p) { return {load_once(p)}; }
inline void load_nibbles(const uint8_t* p, Nibbles& low, Nibbles& high) {
  const __m512i both = load_once(p), mask = _mm512_set1_epi8(15);
  low.v = _mm512_and_si512(both, mask);
  high.v = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline Sum dot(Sum sum, const Quant* a, Bytes w) {
  int four;
  __builtin_memcpy(&four, a, sizeof four);
  return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))};
}
inline NibbleSum begin_nibbles(int32_t start) { return start_sum(start); }
inline Sum end_nibbles(NibbleSum sum, int32_t) { return sum; }
inline F32 to_f32(Sum sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
inline F32 load_half(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline float group_max(F32 x) { return _mm512_reduce_max_ps(x.v); }
inline float group_sum(F32 x) { return _mm512_reduce_add_ps(x.v); }
inline void store_quants(Quant* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

}  // namespace fastserve::cpu::FS_ISA
