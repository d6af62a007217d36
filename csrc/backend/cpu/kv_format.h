// How K and V are held, and how they are multiplied: what attention.h needs to know of a type.
//
// Both products of attention are sums over rows of the stored matrix: over dimensions for the scores, over tokens for
// the values. kStep neighbouring rows share a row of words, one word a column, so that one vector holds the same kStep
// terms of the sums of neighbouring columns.
#pragma once

#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

// What a vector of queries or weights was multiplied by as it was rounded, and where its sums start.
struct Rounded {
  float scale;
  int32_t offset;
};

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
  static Sum start(const Rounded&) { return set1(0.0f); }
  static F32 finish(Sum sum, const Rounded&) { return sum; }
  static Loaded load_rows(const float* p) { return {load(p)}; }
  static Loaded load_first_row(const float* p) { return {load(p)}; }
  static void step(F32& acc, const float* a, const Loaded& b) { acc = fma(set1(a[0]), b.x, acc); }
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
  static Sum start(const Rounded&) { return set1(0.0f); }
  static F32 finish(Sum sum, const Rounded&) { return sum; }
  static Loaded load_rows(const Bf16* p) { return {_mm512_loadu_si512(p)}; }
  static Loaded load_first_row(const Bf16* p) {
    return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff))};
  }
  static void step(F32& acc, const Bf16* a, const Loaded& b) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    acc.v =
        _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), reinterpret_cast<__m512bh>(b.x));
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
  static Sum start(const Rounded&) { return set1(0.0f); }
  static F32 finish(Sum sum, const Rounded&) { return sum; }
  static Loaded load_rows(const Bf16* p) { return {load_even(p), load_odd(p)}; }
  static Loaded load_first_row(const Bf16* p) {
    Loaded rows = load_rows(p);
    rows.odd = set1(0.0f);
    return rows;
  }
  static void step(F32& acc, const float* a, const Loaded& b) {
    acc = fma(set1(a[1]), b.odd, fma(set1(a[0]), b.even, acc));
  }
  static Operand operand(float x) { return x; }
  static F32 put(float* p, F32 first, F32 second, F32 sum) { return Float32Kv::put(p, first, second, sum); }
};
#endif

}  // namespace fastserve::cpu::FS_ISA
