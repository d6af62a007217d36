// Several elements in one access of up to 16 bytes, widened to float32 on the way in and rounded on the way out.
#pragma once

#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

// Elements of 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
struct alignas(N * sizeof(T)) Packed {
  T x[N];
};

template <int N, class T>
__device__ __forceinline__ void load(float (&values)[N], const T* from) {
  const auto packed = *reinterpret_cast<const Packed<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = widen(packed.x[i]);
}
// float32 wider than one access.
template <>
__device__ __forceinline__ void load<8, float>(float (&values)[8], const float* from) {
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
    const auto packed = *reinterpret_cast<const Packed<float, 4>*>(from + half);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[half + i] = packed.x[i];
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  Packed<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.x[i] = narrow<T>(values[i]);
  *reinterpret_cast<Packed<T, N>*>(to) = packed;
}
template <>
__device__ __forceinline__ void store<8, float>(float* to, const float (&values)[8]) {
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
    *reinterpret_cast<Packed<float, 4>*>(to +
                                         half) = {{values[half], values[half + 1], values[half + 2], values[half + 3]}};
  }
}

}  // namespace fastserve::cuda
