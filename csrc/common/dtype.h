// Element types: those the runtime computes in, and those a model file may store.
#pragma once

#include <cstdint>
#include <string>

#include "common/check.h"

namespace fastserve {

struct Bf16 {
  uint16_t bits;
};
struct Half {  // IEEE binary16
  uint16_t bits;
};

// Always inlined, because kernels compiled for different instruction sets share them.
[[gnu::always_inline]] inline float to_float(Bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
[[gnu::always_inline]] inline Bf16 to_bf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Inlined always, for the same reason.
[[gnu::always_inline]] inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa · 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | sign);
  }
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000u | (mantissa << 13));
  return __builtin_bit_cast(float, sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest, ties to even; what is too large becomes infinite, NaN stays NaN.
[[gnu::always_inline]] inline Half to_half(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const auto with_sign = [&](uint32_t half) { return Half{static_cast<uint16_t>(half | sign)}; };
  if (magnitude > 0x7f800000u) return with_sign(0x7e00u);
  if (magnitude >= 0x47800000u) return with_sign(0x7c00u);  // 2^16 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24, which is the last bit of a float near 0.5
    const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
    return with_sign(__builtin_bit_cast(uint32_t, sum) - 0x3f000000u);
  }
  return with_sign((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

// What the runtime computes in.
enum class DType { kFloat32, kBFloat16, kFloat16 };

// How keys and values are held: in a type as they are, or as int8 with one float32 scale for each token's K and V of
// each head.
enum class KvFormat { kFloat32, kBFloat16, kFloat16, kInt8 };

// How a weight matrix is held. The quantized ones: kInt8 has one float32 scale an output; the others are GGUF's types
// of these names, blocks of 32 inputs with a float16 scale (and minimum), held in the bits of the file.
enum class WeightFormat { kFloat32, kBFloat16, kFloat16, kInt8, kQ8_0, kQ4_0, kQ4_1 };

constexpr WeightFormat format_of(DType dtype) {
  return dtype == DType::kFloat32    ? WeightFormat::kFloat32
         : dtype == DType::kBFloat16 ? WeightFormat::kBFloat16
                                     : WeightFormat::kFloat16;
}
constexpr bool is_quantized(WeightFormat format) {
  return format != WeightFormat::kFloat32 && format != WeightFormat::kBFloat16 && format != WeightFormat::kFloat16;
}

inline WeightFormat parse_weight_format(const std::string& name) {
  if (name == "float32") return WeightFormat::kFloat32;
  if (name == "bfloat16") return WeightFormat::kBFloat16;
  if (name == "float16") return WeightFormat::kFloat16;
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "q8_0") return WeightFormat::kQ8_0;
  if (name == "q4_0") return WeightFormat::kQ4_0;
  if (name == "q4_1") return WeightFormat::kQ4_1;
  fail("csrc/common/dtype.h", __LINE__,
       "a weight format must be float32, bfloat16, float16, int8, q8_0, q4_0 or q4_1, got '", name, "'");
}

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  fail("csrc/common/dtype.h", __LINE__, "dtype must be float32, bfloat16 or float16, got '", name, "'");
}

inline KvFormat parse_kv_format(const std::string& name) {
  if (name == "float32") return KvFormat::kFloat32;
  if (name == "bfloat16") return KvFormat::kBFloat16;
  if (name == "float16") return KvFormat::kFloat16;
  if (name == "int8") return KvFormat::kInt8;
  fail("csrc/common/dtype.h", __LINE__, "a KV cache type must be float32, bfloat16, float16 or int8, got '", name, "'");
}

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr int64_t size_of(KvFormat format) {
  return format == KvFormat::kFloat32 ? 4 : format == KvFormat::kInt8 ? 1 : 2;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace fastserve
