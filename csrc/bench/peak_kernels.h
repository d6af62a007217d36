// The instruction set's own loads and multiply-adds, as many as there are registers to keep them independent. Included
// by each peak_*.cc, which is compiled for one instruction set; hence no inline function of another header.
#pragma once

#include <cstdint>

#include "bench/peak.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Tells the compiler that `x`, in a register, may have changed: what is computed from it is computed again.
#if defined(__AVX512F__)
#define FS_CHANGED(x) asm volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define FS_CHANGED(x) asm volatile("" : "+x"(x))
#elif defined(__aarch64__)
#define FS_CHANGED(x) asm volatile("" : "+w"(x))
#else
#define FS_CHANGED(x) asm volatile("" : "+m"(x))
#endif

namespace fastserve::bench {
namespace {

#if defined(__AVX512F__)
using Float = __m512;
using Int = __m512i;
constexpr int kChains = 16;
#elif defined(__AVX2__)
using Float = __m256;
using Int = __m256i;
constexpr int kChains = 10;
#else
using Float = float __attribute__((vector_size(16)));
using Int = uint64_t __attribute__((vector_size(16)));
constexpr int kChains = 10;
#endif
using Words = uint64_t __attribute__((vector_size(sizeof(Int))));

uint64_t read_words(const void* data, int64_t bytes) {
  constexpr int kSums = 8;
  const auto* p = static_cast<const char*>(data);
  Words sums[kSums] = {};
  for (int64_t i = 0; i < bytes; i += kSums * static_cast<int64_t>(sizeof(Words))) {
    for (int s = 0; s < kSums; ++s) {
      Words words;
      __builtin_memcpy(&words, p + i + s * sizeof(Words), sizeof words);
      sums[s] += words;
    }
  }
  uint64_t total = 0;
  for (const Words& sum : sums) {
    for (int lane = 0; lane < static_cast<int>(sizeof(Words) / 8); ++lane) total += sum[lane];
  }
  return total;
}

// kChains chains of `step(sum, a, b)`, `steps` long; each is worth `operations`.
template <class Factor, class Sum, class Step>
inline int64_t run_chains(int64_t steps, int64_t operations, Step step) {
  Factor a = {}, b = {};
  FS_CHANGED(b);  // else products with a known zero are left out
  Sum sums[kChains] = {};
  for (int64_t i = 0; i < steps; ++i) {
    for (int c = 0; c < kChains; ++c) {
      FS_CHANGED(a);
      sums[c] = step(sums[c], a, b);
    }
  }
  for (Sum& sum : sums) FS_CHANGED(sum);
  return steps * kChains * operations;
}

int64_t run_float32(int64_t steps) {
  return run_chains<Float, Float>(steps, 2 * sizeof(Float) / 4, [](Float sum, Float a, Float b) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#else
    return sum + a * b;
#endif
  });
}

// Where there is no dot product of bfloat16, kernels widen it and multiply as float32.
int64_t run_bfloat16(int64_t steps) {
#if defined(__AVX512BF16__)
  return run_chains<Int, Float>(steps, 64, [](Float sum, Int a, Int b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  });
#else
  return run_float32(steps);
#endif
}

// One dot product of four bytes a lane; without VNNI pairs are added twice; without any of it, as float32.
int64_t run_int8(int64_t steps) {
#if defined(__AVX512VNNI__)
  return run_chains<Int, Int>(steps, 128, [](Int sum, Int a, Int b) { return _mm512_dpbusd_epi32(sum, a, b); });
#elif defined(__AVX512BW__)
  return run_chains<Int, Int>(steps, 128, [](Int sum, Int a, Int b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
  });
#elif defined(__AVX2__)
  return run_chains<Int, Int>(steps, 64, [](Int sum, Int a, Int b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
  });
#else
  return run_float32(steps);
#endif
}

constexpr Peak make_peak(const char* isa) { return {isa, read_words, {run_float32, run_bfloat16, run_int8}}; }

}  // namespace
}  // namespace fastserve::bench
