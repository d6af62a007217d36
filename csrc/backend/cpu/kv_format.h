// How K and V are held, and how they are multiplied: what attention.h needs to know of a type.
//
// Both products of attention are sums over rows of the stored matrix: over dimensions for the scores, over tokens for
// the values. kStep neighbouring rows share a row of words, one word a column, so that one vector holds the same kStep
// terms of the sums of neighbouring columns.
#pragma once

#include "backend/cpu/round_row.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

struct Float32Kv {
  using Stored = float;
  using Operand = float;                  // the other factor: the query or the weights
  using Sum = F32;                        // of products
  static constexpr bool kScaled = false;  // tokens' K and V have scales
  static constexpr int kStep = 1;
  static constexpr int kExpDegree = 6;
  struct Loaded {
    F32 x;
  };
  static Sum zero() { return set1(0.0f); }
  static F32 to_float(Sum sum) { return sum; }
  static Loaded load_rows(const float* p) { return {load(p)}; }
  static Loaded load_first_row(const float* p) { return {load(p)}; }
  static F32 step(F32 acc, const float* a, const Loaded& b) { return fma(set1(a[0]), b.x, acc); }
  static Operand operand(float x) { return x; }
  // Stores the weights of 2 · kWidth tokens and adds them to `sum` as they are stored.
  static F32 put(float* p, F32 first, F32 second, F32 sum) {
    store(p, first);
    store(p + kWidth, second);
    return add(add(sum, first), second);
  }
};

#if defined(__AVX512BF16__)
// Queries and weights are rounded to bfloat16; pairs of products are added to float32 in one instruction.
struct BFloat16Kv {
  using Stored = Bf16;
  using Operand = Bf16;
  using Sum = F32;
  static constexpr bool kScaled = false;
  static constexpr int kStep = 2;
  static constexpr int kExpDegree = 3;
  struct Loaded {
    __m512i x;
  };
  static Sum zero() { return set1(0.0f); }
  static F32 to_float(Sum sum) { return sum; }
  static Loaded load_rows(const Bf16* p) { return {_mm512_loadu_si512(p)}; }
  static Loaded load_first_row(const Bf16* p) {
    return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff))};
  }
  static F32 step(F32 acc, const Bf16* a, const Loaded& b) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return {
        _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), reinterpret_cast<__m512bh>(b.x))};
  }
  static Operand operand(float x) { return to_bf16(x); }
  static F32 put(Bf16* p, F32 first, F32 second, F32 sum) {
    const __m512bh both = _mm512_cvtne2ps_pbh(second.v, first.v);
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(both));
    return {_mm512_dpbf16_ps(sum.v, both, reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80)))};  // ones
  }
};
#else
// Only K and V are bfloat16: products are exact, sums are float32.
struct BFloat16Kv {
  using Stored = Bf16;
  using Operand = float;
  using Sum = F32;
  static constexpr bool kScaled = false;
  static constexpr int kStep = 2;
  static constexpr int kExpDegree = 6;
  struct Loaded {
    F32 even, odd;
  };
  static Sum zero() { return set1(0.0f); }
  static F32 to_float(Sum sum) { return sum; }
  static Loaded load_rows(const Bf16* p) {
    Loaded rows;
    load_pairs(p, rows.even, rows.odd);
    return rows;
  }
  static Loaded load_first_row(const Bf16* p) {
    Loaded rows = load_rows(p);
    rows.odd = set1(0.0f);
    return rows;
  }
  static F32 step(F32 acc, const float* a, const Loaded& b) {
    return fma(set1(a[1]), b.odd, fma(set1(a[0]), b.even, acc));
  }
  static Operand operand(float x) { return x; }
  static F32 put(float* p, F32 first, F32 second, F32 sum) { return Float32Kv::put(p, first, second, sum); }
};
#endif

// Bytes with a float32 scale a token. The scale of K multiplies the score and that of V the weight, so that both
// products are of integers.
#if defined(__AVX2__)
// Queries and weights are rounded to 16 bits: a vector of them by its own largest one, which leaves less of an error
// than bfloat16 would. Sums are exact.
struct Int8Kv {
  using Stored = int8_t;
  using Operand = int16_t;
  static constexpr bool kScaled = true;
  static constexpr int kStep = 2;
  static constexpr int kExpDegree = 3;
  // So many products of a byte and an Operand must not overflow 32 bits.
  static constexpr float limit(int64_t products) { return products <= 516 ? 32767.0f : 16909320.0f / products; }

#if defined(__AVX512F__)
  struct Sum {
    __m512i v;
  };
  struct Loaded {
    __m512i x;
  };
  static Sum zero() { return {_mm512_setzero_si512()}; }
  static F32 to_float(Sum sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
  static Loaded load_rows(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Loaded load_first_row(const int8_t* p) {
    return {_mm512_and_si512(load_rows(p).x, _mm512_set1_epi32(0xffff))};
  }
  static Sum step(Sum acc, const int16_t* a, const Loaded& b) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(acc.v, b.x, _mm512_set1_epi32(pair))};
#else
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(b.x, _mm512_set1_epi32(pair)))};
#endif
  }
  static void put(int16_t* p, F32 x) {
    const __m256i words = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  }
#else
  struct Sum {
    __m256i v;
  };
  struct Loaded {
    __m256i x;
  };
  static Sum zero() { return {_mm256_setzero_si256()}; }
  static F32 to_float(Sum sum) { return {_mm256_cvtepi32_ps(sum.v)}; }
  static Loaded load_rows(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Loaded load_first_row(const int8_t* p) {
    return {_mm256_and_si256(load_rows(p).x, _mm256_set1_epi32(0xffff))};
  }
  static Sum step(Sum acc, const int16_t* a, const Loaded& b) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(b.x, _mm256_set1_epi32(pair)))};
  }
  static void put(int16_t* p, F32 x) {
    const __m256i words = _mm256_cvtps_epi32(x.v);
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
#endif

  static float round_query(const float* x, int64_t n, int16_t* q) {
    return round_row(x, n, limit(n), [&](int64_t i, int32_t value) { q[i] = static_cast<int16_t>(value); });
  }
  // Rounds `count` weights, which are not negative and lie where p does, and returns their scale.
  static float round_weights(const float* weights, int64_t count, float largest, int16_t* p) {
    const F32 inverse = set1(largest > 0x1p-100f ? 32767.0f / largest : 0.0f);
    for (int64_t i = 0; i < count; i += kWidth) put(p + i, mul(load(weights + i), inverse));
    return largest / 32767.0f;
  }
};
#else
// Only K and V are integers, and exact as float32.
struct Int8Kv {
  using Stored = int8_t;
  using Operand = float;
  using Sum = F32;
  static constexpr bool kScaled = true;
  static constexpr int kStep = 2;
  static constexpr int kExpDegree = 6;
  struct Loaded {
    F32 even, odd;
  };
  static Sum zero() { return set1(0.0f); }
  static F32 to_float(F32 sum) { return sum; }
  static Loaded load_rows(const int8_t* p) {
    Loaded rows;
    for (int i = 0; i < kWidth; ++i) {
      rows.even.v[i] = p[2 * i];
      rows.odd.v[i] = p[2 * i + 1];
    }
    return rows;
  }
  static Loaded load_first_row(const int8_t* p) {
    Loaded rows = load_rows(p);
    rows.odd = set1(0.0f);
    return rows;
  }
  static F32 step(F32 acc, const float* a, const Loaded& b) {
    return fma(set1(a[1]), b.odd, fma(set1(a[0]), b.even, acc));
  }
  static float round_query(const float* x, int64_t n, float* q) {
    for (int64_t i = 0; i < n; ++i) q[i] = x[i];
    return 1.0f;
  }
  static float round_weights(const float*, int64_t, float, float*) { return 1.0f; }  // they stay as they are
};
#endif

}  // namespace fastserve::cpu::FS_ISA
