// Passes over logits for the sampler; see backend/logits.h.
#pragma once

#include "backend/cpu/simd.h"
#include "backend/logits.h"

namespace fastserve::cpu::FS_ISA {

constexpr float kNoLogit = -__builtin_inff();

// The last, incomplete vector of a row, filled up with what weighs nothing.
inline F32 load_rest(const float* x, int64_t count) {
  alignas(64) float lane[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) lane[i] = i < count ? x[i] : kNoLogit;
  return load(lane);
}

struct Weigher {
  explicit Weigher(const Weighting& w) : maximum(set1(w.maximum)), scale(set1(w.scale)), cut(set1(w.cut)) {
    for (F32* x : {&terms.log2e, &terms.ln2_high, &terms.ln2_low, &terms.one, &lowest}) *x = pinned(*x);
    for (F32& x : terms.p) x = pinned(x);
  }
  // No logit exceeds the maximum, and those that e^x underflows for are cut.
  F32 operator()(F32 x) const {
    return where_at_least(x, cut, exp_inside(max(mul(sub(x, maximum), scale), lowest), terms));
  }

  F32 maximum, scale, cut, lowest = set1(-87.0f);
  ExpTerms terms;
};

inline float maximum_logit(const float* x, int64_t n) {
  constexpr uint32_t kAll = (uint64_t{1} << kWidth) - 1;
  const F32 lowest = set1(kNoLogit);  // every number is at least that, and a NaN is not
  F32 best0 = lowest, best1 = lowest;
  uint32_t numbers = kAll;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const F32 a = load(x + i), b = load(x + i + kWidth);
    best0 = max(best0, a);
    best1 = max(best1, b);
    numbers &= at_least(a, lowest) & at_least(b, lowest);
  }
  for (; i < n; i += kWidth) {
    const F32 a = i + kWidth <= n ? load(x + i) : load_rest(x + i, n - i);
    best0 = max(best0, a);
    numbers &= at_least(a, lowest);
  }
  return numbers == kAll ? reduce_max(max(best0, best1)) : __builtin_nanf("");
}

inline float sum_weights(const float* x, int64_t n, const Weighting& w) {
  const Weigher weight(w);
  F32 total[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) total[j] = add(total[j], weight(load(x + i + j * kWidth)));
  }
  for (; i < n; i += kWidth) {
    const F32 a = i + kWidth <= n ? load(x + i) : load_rest(x + i, n - i);
    total[0] = add(total[0], weight(a));
  }
  return reduce_add(add(add(total[0], total[1]), add(total[2], total[3])));
}

inline void weigh_logits(const float* x, int64_t n, const Weighting& w, float* weights) {
  const Weigher weight(w);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(weights + i, weight(load(x + i)));
  if (i == n) return;
  alignas(64) float lane[kWidth];
  store(lane, weight(load_rest(x + i, n - i)));
  for (int64_t j = 0; i + j < n; ++j) weights[i + j] = lane[j];
}

inline int64_t collect_logits(const float* x, int64_t n, float low, float high, float* kept) {
  const F32 from = set1(low), to = set1(high);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const F32 a = i + kWidth <= n ? load(x + i) : load_rest(x + i, n - i);
    count += compress(kept + count, a, at_least(a, from) & ~at_least(a, to));
  }
  return count;
}

}  // namespace fastserve::cpu::FS_ISA
