// Integer dot products with AVX-512 BW: pairs of products are added in int16, which saturates. So bytes are taken
// apart in sign and magnitude: 2 · 128 · 127 fits.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

constexpr int kQuantizedRows = 5;
constexpr bool kSignedBytes = true;  // whether dot() takes bytes for what they stand for (value - 128)
using Quant = int8_t;
struct Sum {
  __m512i v;
};
struct Bytes {
  __m512i magnitude;
  __mmask64 negative;
};
struct Nibbles {
  __m512i v;
};
// Of a group's products with nibbles, all 16 that a lane gets fit in int16: 16 · 15 · 128 = 30,720.
struct NibbleSum {
  __m512i v;
};

inline Sum start_sum(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Bytes load_bytes(const uint8_t* p) {
  const __m512i value = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  return {_mm512_abs_epi8(value), _mm512_movepi8_mask(value)};
}
inline void load_nibbles(const uint8_t* p, Nibbles& low, Nibbles& high) {
  const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  low.v = _mm512_and_si512(both, mask);
  high.v = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline __m512i broadcast_four(const Quant* a) {
  int four;
  __builtin_memcpy(&four, a, sizeof four);
  return _mm512_set1_epi32(four);
}
inline Sum add_pairs(Sum sum, __m512i pairs) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
inline NibbleSum begin_nibbles(int32_t) { return {_mm512_setzero_si512()}; }
inline NibbleSum dot(NibbleSum sum, const Quant* a, Nibbles w) {
  return {_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(w.v, broadcast_four(a)))};
}
inline Sum end_nibbles(NibbleSum sum, int32_t start) { return add_pairs(start_sum(start), sum.v); }
inline Sum dot(Sum sum, const Quant* a, Bytes w) {
  const __m512i four = broadcast_four(a);
  const __m512i turned = _mm512_mask_sub_epi8(four, w.negative, _mm512_setzero_si512(), four);
  return add_pairs(sum, _mm512_maddubs_epi16(w.magnitude, turned));
}
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
