// Stands in for csrc/backend/cuda/simt.cuh where g++ compiles kernels: the same names, done by tests/simt/machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "backend/cuda/early_launch.h"
#include "backend/cuda/runtime_api.h"
#include "backend/cuda/shared_limits.h"
#include "common/dtype.h"
#include "fake_cudart/launch.h"
#include "machine/intrinsics.h"
#include "machine/machine.h"
#include "machine/matrix.h"

// CUDA's headers make its keywords empty for other compilers; this one they leave out.
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __shared__
#define __shared__ static_assert(false, "shared memory is shared_memory<T>() only");

namespace fastserve::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- elements

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return to_float(x); }
inline float widen(Half x) { return half_to_float(x.bits); }

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline Bf16 narrow<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
inline Half narrow<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

template <class T>
inline uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(narrow<T>(low).bits) | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

// ---- shared memory

template <class T>
inline T* shared_memory() {
  return reinterpret_cast<T*>(simt::shared_memory());
}

// ---- matrix instructions

template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const simt::Site& site = simt::Site::current()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>);
  simt::multiply(std::is_same_v<T, Bf16> ? simt::Element::kBf16 : simt::Element::kHalf, d, a, b, site);
}
inline void load_matrices(uint32_t (&r)[4], const void* row, const simt::Site& site = simt::Site::current()) {
  simt::load_matrices(r, row, false, site);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row,
                                     const simt::Site& site = simt::Site::current()) {
  simt::load_matrices(r, row, true, site);
}

// ---- asynchronous copies

inline void copy_async(void* to, const void* from, bool valid = true) { simt::begin_copy(to, from, valid); }
inline void copy_constant_async(void* to, const void* from) { simt::begin_constant_copy(to, from); }
inline void commit_copies() { simt::commit_copies(); }
template <int kOpen>
inline void wait_copies() {
  static_assert(kOpen >= 0);
  simt::wait_copies(kOpen);
}

// ---- other instructions

inline void store_vector(void* to, uint4 value) {
  simt::check_global("store_vector", to, sizeof value, sizeof value);
  std::memcpy(to, &value, sizeof value);
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float reciprocal_fast(float x) { return 1.0f / x; }

// ---- kernels that begin early

inline void let_next_begin() { simt::let_next_begin(); }
inline void wait_for_predecessor() { simt::wait_for_predecessor(); }
inline void begin_after_predecessor() {
  let_next_begin();
  wait_for_predecessor();
}

// ---- launches

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
  unsigned cluster = 1;
  bool early = false;
  simt::Site where = simt::Site::current();
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, config.shared_bytes);
  if (config.early && kernels_begin_early()) prefer_shared_memory(function);
  std::tuple<Parameters...> values(static_cast<Arguments&&>(arguments)...);
  fake_cudart::launch(
      function, {config.grid, config.block, config.shared_bytes, config.cluster, config.early, config.where},
      [kernel, values] { std::apply(kernel, values); }, &values, sizeof values, config.stream);
}

}  // namespace fastserve::cuda
