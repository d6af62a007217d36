// K and V as bytes, as kv_format.h describes a type: value + 128, with a float32 scale a token. The scale of K
// multiplies the score and that of V the weight, so that both products are of integers.
#pragma once

#include "backend/cpu/kv_format.h"
#include "backend/cpu/round_row.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

#if defined(__AVX2__)

// Queries and weights are rounded to integers of 15 bits: a vector of them by its own largest one, which leaves less of
// an error than bfloat16 would. Sums are exact.
struct Int8Kv {
  using Stored = uint8_t;
  using Operand = int16_t;  // its place; in what order depends on the instructions
  static constexpr bool kScaled = true;
  static constexpr int kStep = 4;
  static constexpr int kExpDegree = 3;
  static constexpr float kLimit = 127 * 128 + 63;

#if defined(__AVX512F__)
  using Int = __m512i;
  static Int load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Int set1(int32_t x) { return _mm512_set1_epi32(x); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int multiply(Int a, Int b) { return _mm512_madd_epi16(a, b); }
  static Int even_bytes(Int x) { return _mm512_and_si512(x, _mm512_set1_epi32(0x00ff00ff)); }
  static Int odd_bytes(Int x) { return _mm512_srli_epi16(x, 8); }
  static Int to_int(F32 x) { return _mm512_cvtps_epi32(x.v); }
  static F32 to_f32(Int x) { return {_mm512_cvtepi32_ps(x)}; }
  // Stores the eight bytes at `order` of every four words.
  static void store_eighths(int16_t* p, Int x, int64_t order) {
    const Int low = _mm512_shuffle_epi8(x, _mm512_set1_epi64(order));
    const Int joined = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(joined));
  }
#else
  using Int = __m256i;
  static Int load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Int set1(int32_t x) { return _mm256_set1_epi32(x); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int multiply(Int a, Int b) { return _mm256_madd_epi16(a, b); }
  static Int even_bytes(Int x) { return _mm256_and_si256(x, _mm256_set1_epi32(0x00ff00ff)); }
  static Int odd_bytes(Int x) { return _mm256_srli_epi16(x, 8); }
  static Int to_int(F32 x) { return _mm256_cvtps_epi32(x.v); }
  static F32 to_f32(Int x) { return {_mm256_cvtepi32_ps(x)}; }
  static void store_eighths(int16_t* p, Int x, int64_t order) {
    const Int low = _mm256_shuffle_epi8(x, _mm256_set1_epi64x(order));
    const __m128i joined = _mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), joined);
  }
#endif
  static Int broadcast(const int16_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return set1(word);
  }

#if defined(__AVX512VNNI__)
  // Four products of bytes are one instruction: an operand is 128 · high + low, four high bytes and then four low ones.
  struct Loaded {
    Int bytes;
  };
  struct Sum {
    Int high, low;
  };
  static Loaded load_rows(const uint8_t* p) { return {load_bytes(p)}; }
  static Sum start(const Rounded& operand) { return {set1(0), set1(operand.offset)}; }
  static void step(Sum& acc, const int16_t* a, const Loaded& b) {
    acc.high = _mm512_dpbusd_epi32(acc.high, b.bytes, broadcast(a));
    acc.low = _mm512_dpbusd_epi32(acc.low, b.bytes, broadcast(a + 2));
  }
  static Int joined(const Sum& sum) { return add(_mm512_slli_epi32(sum.high, 7), sum.low); }
  static void put(int16_t* operand, int64_t i, int32_t x) {
    auto* bytes = reinterpret_cast<signed char*>(operand) + i / 4 * 8 + i % 4;
    const int32_t high = (x + 64) >> 7;
    bytes[0] = static_cast<signed char>(high);
    bytes[4] = static_cast<signed char>(x - 128 * high);
  }
  static void put(int16_t* p, Int x) {
    // A word of high and low byte; the bits of `low` that are too many do no harm beyond it.
    const Int high = _mm512_srai_epi32(add(x, set1(64)), 7), low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 7));
    const Int both = _mm512_or_si512(_mm512_and_si512(high, set1(0xff)), _mm512_slli_epi32(low, 8));
    store_eighths(p, both, 0x0d0905010c080400);
  }
#else
  // Products of 16 bits: an operand's elements 0 and 2, which meet the even bytes, then 1 and 3.
  struct Loaded {
    Int even, odd;
  };
  struct Sum {
    Int sum;
  };
  static Loaded load_rows(const uint8_t* p) {
    const Int bytes = load_bytes(p);
    return {even_bytes(bytes), odd_bytes(bytes)};
  }
  static Sum start(const Rounded& operand) { return {set1(operand.offset)}; }
  static void step(Sum& acc, const int16_t* a, const Loaded& b) {
    acc.sum = add(acc.sum, add(multiply(b.even, broadcast(a)), multiply(b.odd, broadcast(a + 2))));
  }
  static Int joined(const Sum& sum) { return sum.sum; }
  static void put(int16_t* operand, int64_t i, int32_t x) {
    operand[i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = static_cast<int16_t>(x);
  }
  static void put(int16_t* p, Int x) { store_eighths(p, x, 0x0d0c050409080100); }
#endif

  static Loaded load_first_row(const uint8_t* p) { return load_rows(p); }  // the weights of the others are 0
  static F32 finish(const Sum& sum, const Rounded& operand) {
    return mul(to_f32(joined(sum)), FS_ISA::set1(operand.scale));
  }

  // Bytes are 128 too large: the sum of the operand times that is where sums start.
  static Rounded rounded(float scale, uint32_t sum) { return {scale, static_cast<int32_t>(-128u * sum)}; }
  static Rounded round_query(const float* x, int64_t n, int16_t* q) {
    uint32_t sum = 0;
    const float limit = n <= 1024 ? kLimit : kLimit * 1024 / n;  // or sums would not fit in 32 bits
    const float scale = round_row(x, n, limit, [&](int64_t i, int32_t value) {
      put(q, i, value);
      sum += static_cast<uint32_t>(value);
    });
    return rounded(scale, sum);
  }
  // Weights, which are not negative; they may lie where they go.
  static Rounded round_weights(const float* weights, int64_t count, float largest, int16_t* p) {
    const F32 inverse = FS_ISA::set1(largest > 0x1p-100f ? kLimit / largest : 0.0f);
    Int total = set1(0);
    for (int64_t i = 0; i < count; i += kWidth) {
      const Int x = to_int(mul(load(weights + i), inverse));
      total = add(total, x);
      put(p + i, x);
    }
    uint32_t lane[kWidth], sum = 0;
    __builtin_memcpy(lane, &total, sizeof lane);
    for (const uint32_t each : lane) sum += each;
    return rounded(largest / kLimit, sum);
  }
};

#else

// Queries and weights are float32 as they are.
struct Int8Kv {
  using Stored = uint8_t;
  using Operand = float;
  using Sum = F32;
  static constexpr bool kScaled = true;
  static constexpr int kStep = 4;
  static constexpr int kExpDegree = 6;
  struct Loaded {
    F32 x[kStep];
  };
  static Loaded load_rows(const uint8_t* p) {
    Words bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    Loaded rows;
    for (int i = 0; i < kStep; ++i) {
      const Ints byte = reinterpret_cast<Ints>(bytes >> (8 * i) & 0xffu);
      rows.x[i] = {__builtin_convertvector(byte - 128, Floats)};
    }
    return rows;
  }
  static Loaded load_first_row(const uint8_t* p) { return load_rows(p); }
  static Sum start(const Rounded&) { return set1(0.0f); }
  static void step(Sum& acc, const float* a, const Loaded& b) {
    for (int i = 0; i < kStep; ++i) acc = fma(set1(a[i]), b.x[i], acc);
  }
  static F32 finish(Sum sum, const Rounded&) { return sum; }
  static Rounded round_query(const float* x, int64_t n, float* q) {
    for (int64_t i = 0; i < n; ++i) q[i] = x[i];
    return {};
  }
  static Rounded round_weights(const float*, int64_t, float, float*) { return {}; }
};

#endif

}  // namespace fastserve::cpu::FS_ISA
