// One weight of a matrix as float32, for kernels that do not read whole units: embedding, float32 products.
#pragma once

#include "backend/cuda/kernels.h"
#include "backend/cuda/quantized_layout.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

template <WeightFormat kFormat>
constexpr bool kQuantized = is_quantized(kFormat);

// int8's scale is not applied: it belongs to the output and comes last in a product (channel_scale()).
template <WeightFormat kFormat>
__device__ __forceinline__ float weight_element(const DeviceMatrix& matrix, int64_t output, int64_t input) {
  if constexpr (!kQuantized<kFormat>) {
    const int64_t index = output * matrix.k_padded + input;
    if constexpr (kFormat == WeightFormat::kFloat32) return static_cast<const float*>(matrix.data)[index];
    if constexpr (kFormat == WeightFormat::kBFloat16) return widen(static_cast<const Bf16*>(matrix.data)[index]);
    if constexpr (kFormat == WeightFormat::kFloat16) return widen(static_cast<const Half*>(matrix.data)[index]);
  } else {
    const WeightPlace place = weight_place(kFormat, matrix.k_padded, output, input);
    const auto* bytes = static_cast<const uint8_t*>(matrix.data) + place.offset;
    if constexpr (kFormat == WeightFormat::kInt8) return static_cast<float>(*bytes) - 128.0f;
    const auto* scale = static_cast<const Half*>(matrix.scales) + scale_place(kFormat, matrix.k_padded, output, input);
    if constexpr (kFormat == WeightFormat::kQ8_0) return (static_cast<float>(*bytes) - 128.0f) * widen(scale[0]);
    const auto nibble = static_cast<float>(*reinterpret_cast<const uint32_t*>(bytes) >> place.shift & 15);
    if constexpr (kFormat == WeightFormat::kQ4_0) return (nibble - 8.0f) * widen(scale[0]);
    if constexpr (kFormat == WeightFormat::kQ4_1) return fmaf(nibble, widen(scale[0]), widen(scale[1]));
  }
}

// What a sum over an output's weight_element()s is multiplied by.
template <WeightFormat kFormat>
__device__ __forceinline__ float channel_scale(const DeviceMatrix& matrix, int64_t output) {
  if constexpr (kFormat == WeightFormat::kInt8) return static_cast<const float*>(matrix.scales)[output];
  return 1.0f;
}

}  // namespace fastserve::cuda
