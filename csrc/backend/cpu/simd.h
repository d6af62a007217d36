// One vector type per instruction set. Included once by each isa_*.cc, which defines FS_ISA, the namespace that keeps
// the copies of every kernel apart. Nothing here may call an inline function of another header: the linker would be
// free to keep the copy that was compiled for the widest instruction set.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastserve::cpu::FS_ISA {

#if defined(__AVX512F__)

constexpr int kWidth = 16;
struct F32 {
  __m512 v;
};
inline F32 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline F32 load(const Bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 abs(F32 x) { return {_mm512_abs_ps(x.v)}; }
// x · 2^n for integral n in [-126, 127].
inline F32 scale2(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// Lanes where a >= b, which a NaN never is, as bits; and x where it is so, 0 elsewhere.
inline uint32_t at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline F32 where_at_least(F32 a, F32 b, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), x.v)};
}
// Stores the lanes of `mask`, in order and without gaps, and returns how many. Writes a whole vector: the compressing
// store would write less, but is microcode on some machines.
inline int64_t compress(float* p, F32 x, uint32_t mask) {
  store(p, {_mm512_maskz_compress_ps(static_cast<__mmask16>(mask), x.v)});
  return __builtin_popcount(mask);
}
// Keeps a constant in a register: GCC would load it from memory again for every use, one cycle each.
inline F32 pinned(F32 x) {
  asm("" : "+v"(x.v));
  return x;
}
// Of 2 · kWidth bfloat16 values those at even and those at odd places.
inline F32 load_even(const Bf16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline F32 load_odd(const Bf16* p) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high))};
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kWidth = 8;
struct F32 {
  __m256 v;
};
inline F32 set1(float x) { return {_mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
inline F32 load(const Bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round(F32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 abs(F32 x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline F32 scale2(F32 x, F32 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(exponent))};
}
inline uint32_t at_least(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
inline F32 where_at_least(F32 a, F32 b, F32 x) { return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ), x.v)}; }
inline __m256i load_words(const Bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline F32 load_even(const Bf16* p) { return {_mm256_castsi256_ps(_mm256_slli_epi32(load_words(p), 16))}; }
inline F32 load_odd(const Bf16* p) {  // two shifts: a mask would take one of few registers
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(load_words(p), 16), 16))};
}

#else  // GCC and Clang vectors: SSE2, NEON or plain scalar code, without fused multiply-add

constexpr int kWidth = 4;
using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
struct F32 {
  Floats v;
};
inline F32 set1(float x) { return {Floats{x, x, x, x}}; }
inline F32 load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return {v};
}
inline void store(float* p, F32 x) { __builtin_memcpy(p, &x.v, sizeof x.v); }
inline F32 load(const Bf16* p) {
  const Words wide = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  return {reinterpret_cast<Floats>(wide << 16)};
}
inline F32 add(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 div(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
// Exact for |x| < 2^22, which covers every use.
inline F32 round(F32 x) {
  const F32 shift = set1(12582912.0f);  // 1.5 · 2^23: adding it leaves no room for a fraction
  return sub(add(x, shift), shift);
}
inline F32 abs(F32 x) { return {reinterpret_cast<Floats>(reinterpret_cast<Words>(x.v) & 0x7fffffffu)}; }
inline F32 scale2(F32 x, F32 n) {
  const Ints exponent = (__builtin_convertvector(n.v, Ints) + 127) << 23;
  return {x.v * reinterpret_cast<Floats>(exponent)};
}
inline uint32_t at_least(F32 a, F32 b) {
  const Words bits = reinterpret_cast<Words>(a.v >= b.v) & Words{1, 2, 4, 8};
  return bits[0] | bits[1] | bits[2] | bits[3];
}
inline F32 where_at_least(F32 a, F32 b, F32 x) {
  return {reinterpret_cast<Floats>(reinterpret_cast<Words>(a.v >= b.v) & reinterpret_cast<Words>(x.v))};
}
inline Words load_words(const Bf16* p) {
  Words both;
  __builtin_memcpy(&both, p, sizeof both);
  return both;
}
inline F32 load_even(const Bf16* p) { return {reinterpret_cast<Floats>(load_words(p) << 16)}; }
inline F32 load_odd(const Bf16* p) { return {reinterpret_cast<Floats>(load_words(p) & 0xffff0000u)}; }

#endif

#if !defined(__AVX512F__)
inline F32 pinned(F32 x) { return x; }  // there are too few registers
inline int64_t compress(float* p, F32 x, uint32_t mask) {
  alignas(64) float lane[kWidth];
  store(lane, x);
  int64_t count = 0;
  for (; mask != 0; mask &= mask - 1) p[count++] = lane[__builtin_ctz(mask)];
  return count;
}
#endif

// Sum and maximum of the lanes, in a fixed order: the upper half joins the lower one, until one lane is left.
#if defined(__AVX512F__)
inline float reduce_add(F32 x) { return _mm512_reduce_add_ps(x.v); }
inline float reduce_max(F32 x) { return _mm512_reduce_max_ps(x.v); }
#elif defined(__AVX2__) && defined(__FMA__)
inline float reduce_add(F32 x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float reduce_max(F32 x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
#else
inline float reduce_add(F32 x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
inline float reduce_max(F32 x) {
  const float a = x.v[0] > x.v[2] ? x.v[0] : x.v[2], b = x.v[1] > x.v[3] ? x.v[1] : x.v[3];
  return a > b ? a : b;
}
#endif

// What exp_inside computes with. Loops that are nothing but exponentials pass their own, `pinned`.
struct ExpTerms {
  F32 log2e = set1(1.44269504f);
  F32 ln2_high = set1(-0.693359375f), ln2_low = set1(2.12194440e-4f);
  F32 p[6] = {set1(1.9875691500e-4f), set1(1.3981999507e-3f), set1(8.3334519073e-3f),
              set1(4.1665795894e-2f), set1(1.6666665459e-1f), set1(5.0000001201e-1f)};
  F32 one = set1(1.0f);
};

// e^x with a relative error below 2 ulp on [-87, 88], and anything elsewhere. Cody-Waite reduction and a degree-6
// Taylor-like polynomial (coefficients of Cephes' expf).
inline F32 exp_inside(F32 x, const ExpTerms& terms = {}) {
  const F32 n = round(mul(x, terms.log2e));
  F32 r = fma(n, terms.ln2_high, x);
  r = fma(n, terms.ln2_low, r);
  F32 p = terms.p[0];
  for (int i = 1; i < 6; ++i) p = fma(p, r, terms.p[i]);
  p = fma(p, mul(r, r), add(r, terms.one));
  return scale2(p, n);
}

// The same; arguments outside are clamped.
inline F32 exp(F32 x) { return exp_inside(max(min(x, set1(88.0f)), set1(-87.0f))); }

inline float exp(float x) {
  alignas(64) float lane[kWidth];
  store(lane, exp(set1(x)));
  return lane[0];
}

// 2^x for x <= 0; below -126 it stays at 2^-126. A polynomial of degree `Degree` on [-1/2, 1/2], its relative error the
// smallest for which 2^0 is exactly 1: 1.0e-4 for degree 3, beneath a bfloat16's rounding, and 2.0e-9 for degree 6.
template <int Degree>
inline F32 exp2_negative(F32 x) {
  static_assert(Degree == 3 || Degree == 6);
  constexpr float kCubic[] = {5.500893126e-2f, 2.422109678e-1f, 6.932829281e-1f, 1.0f};
  constexpr float kSextic[] = {
      1.535336206e-4f, 1.339887456e-3f, 9.618437358e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472029e-1f, 1.0f};
  x = max(set1(-126.0f), x);  // in this order, which keeps a NaN
  const F32 n = round(x), r = sub(x, n);
  F32 p = set1(Degree == 3 ? kCubic[0] : kSextic[0]);
  for (int i = 1; i <= Degree; ++i) p = fma(p, r, set1(Degree == 3 ? kCubic[i] : kSextic[i]));
  return scale2(p, n);
}

}  // namespace fastserve::cpu::FS_ISA
