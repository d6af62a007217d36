// Activation functions, with the gate's product.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

inline F32 silu(F32 x) { return div(x, add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

inline F32 gelu_tanh(F32 x) {
  // 0.5 x (1 + tanh u) = x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
  const F32 u = mul(mul(set1(0.7978845608f), x), fma(mul(x, x), set1(0.044715f), set1(1.0f)));
  return div(x, add(set1(1.0f), exp(mul(u, set1(-2.0f)))));
}

inline F32 gelu(F32 x) {
  // 0.5 x (1 + erf(x / √2)); erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
  const F32 z = mul(abs(x), set1(0.7071067812f));
  const F32 t = div(set1(1.0f), fma(set1(0.3275911f), z, set1(1.0f)));
  F32 p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F32 complement = mul(mul(p, t), exp(sub(set1(0.0f), mul(z, z))));  // 1 - erf(z)
  // Φ(x) is 1 - complement/2 for x > 0, complement/2 below: written without a branch.
  const F32 half = mul(set1(0.5f), complement);
  return sub(max(x, set1(0.0f)), mul(abs(x), half));
}

template <class Function>
inline void apply(Function function, float* x, const float* product, int64_t width) {
  for (int64_t i = 0; i < width; i += kWidth) {  // rows are padded to whole vectors
    F32 y = function(load(x + i));
    if (product != nullptr) y = mul(y, load(product + i));
    store(x + i, y);
  }
}

// x[i] = act(x[i]) (· product[i]) for i < width, in whole vectors: the caller leaves room for kPad elements.
inline void activate(Activation kind, float* x, const float* product, int64_t width) {
  switch (kind) {
    case Activation::kSilu:
      return apply([](F32 v) { return silu(v); }, x, product, width);
    case Activation::kGelu:
      return apply([](F32 v) { return gelu(v); }, x, product, width);
    case Activation::kGeluTanh:
      return apply([](F32 v) { return gelu_tanh(v); }, x, product, width);
    case Activation::kRelu:
      return apply([](F32 v) { return max(v, set1(0.0f)); }, x, product, width);
  }
}

}  // namespace fastserve::cpu::FS_ISA
