// Integer dot products with AVX2: pairs of products are added in int16, which saturates. So bytes are taken apart in
// sign and magnitude: 2 · 128 · 127 fits.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

constexpr int kQuantizedRows = 2;
constexpr bool kSignedBytes = true;  // whether dot() takes bytes for what they stand for (value - 128)
using Quant = int8_t;
struct Sum {
  __m256i v;
};
struct Bytes {
  __m256i v, magnitude;
};
struct Nibbles {
  __m256i v;
};
// Of a group's products with nibbles, all 16 that a lane gets fit in int16: 16 · 15 · 128 = 30,720.
struct NibbleSum {
  __m256i v;
};

inline Sum start_sum(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline __m256i load_vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes load_bytes(const uint8_t* p) {
  const __m256i value = _mm256_xor_si256(load_vector(p), _mm256_set1_epi8(-128));
  return {value, _mm256_abs_epi8(value)};
}
inline void load_nibbles(const uint8_t* p, Nibbles& low, Nibbles& high) {
  const __m256i both = load_vector(p), mask = _mm256_set1_epi8(15);
  low.v = _mm256_and_si256(both, mask);
  high.v = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}
inline __m256i broadcast_four(const Quant* a) {
  int four;
  __builtin_memcpy(&four, a, sizeof four);
  return _mm256_set1_epi32(four);
}
inline Sum add_pairs(Sum sum, __m256i pairs) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline NibbleSum begin_nibbles(int32_t) { return {_mm256_setzero_si256()}; }
inline NibbleSum dot(NibbleSum sum, const Quant* a, Nibbles w) {
  return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(w.v, broadcast_four(a)))};
}
inline Sum end_nibbles(NibbleSum sum, int32_t start) { return add_pairs(start_sum(start), sum.v); }
inline Sum dot(Sum sum, const Quant* a, Bytes w) {
  return add_pairs(sum, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(broadcast_four(a), w.v)));
}
inline F32 to_f32(Sum sum) { return {_mm256_cvtepi32_ps(sum.v)}; }
inline F32 load_half(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline float group_max(F32 x) { return reduce_max(x); }
inline float group_sum(F32 x) { return reduce_add(x); }
inline void store_quants(Quant* p, F32 x) {
  const __m256i wide = _mm256_cvtps_epi32(x.v);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}

}  // namespace fastserve::cpu::FS_ISA
