#include "model/dequantize.h"

#include <cstring>

#include "common/check.h"

namespace fastserve {

namespace {

constexpr int64_t kBlock = 32;

template <class T>
T read(const unsigned char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Low nibbles are the first half of a block, high nibbles the second.
void unpack_nibbles(const unsigned char* packed, float scale, float offset, float* output) {
  for (int64_t i = 0; i < kBlock / 2; ++i) {
    output[i] = static_cast<float>(packed[i] & 15) * scale + offset;
    output[i + kBlock / 2] = static_cast<float>(packed[i] >> 4) * scale + offset;
  }
}

}  // namespace

SourceType parse_source_type(const std::string& name) {
  if (name == "f32") return SourceType::kF32;
  if (name == "f16") return SourceType::kF16;
  if (name == "bf16") return SourceType::kBF16;
  if (name == "q8_0") return SourceType::kQ8_0;
  if (name == "q4_0") return SourceType::kQ4_0;
  if (name == "q4_1") return SourceType::kQ4_1;
  if (name == "q8_1") return SourceType::kQ8_1;
  FS_CHECK(false, "tensor type '", name, "' is not one of f32, f16, bf16, q8_0, q8_1, q4_0, q4_1");
  return SourceType::kF32;
}

int64_t block_bytes(SourceType type) {
  switch (type) {
    case SourceType::kQ8_0:
      return 34;
    case SourceType::kQ8_1:
      return 36;
    case SourceType::kQ4_0:
      return 18;
    case SourceType::kQ4_1:
      return 20;
    default:
      FS_CHECK(false, "only quantized types have blocks");
      return 0;
  }
}

int64_t source_bytes(SourceType type, int64_t count) {
  switch (type) {
    case SourceType::kF32:
      return count * 4;
    case SourceType::kF16:
    case SourceType::kBF16:
      return count * 2;
    default:
      break;
  }
  FS_CHECK(count % kBlock == 0, "a quantized row holds a multiple of ", kBlock, " elements, not ", count);
  return count / kBlock * block_bytes(type);
}

void dequantize(SourceType type, const void* source, int64_t count, float* output) {
  const auto* p = static_cast<const unsigned char*>(source);
  switch (type) {
    case SourceType::kF32:
      std::memcpy(output, p, count * sizeof(float));
      return;
    case SourceType::kF16:
      for (int64_t i = 0; i < count; ++i) output[i] = half_to_float(read<uint16_t>(p + 2 * i));
      return;
    case SourceType::kBF16:
      for (int64_t i = 0; i < count; ++i) output[i] = to_float(Bf16{read<uint16_t>(p + 2 * i)});
      return;
    case SourceType::kQ8_0:  // float16 scale, 32 int8
    case SourceType::kQ8_1:  // float16 scale, float16 scale · sum (which says nothing new), 32 int8
      for (int64_t block = 0; block < count; block += kBlock, p += block_bytes(type)) {
        const float scale = half_to_float(read<uint16_t>(p));
        const unsigned char* values = p + block_bytes(type) - kBlock;
        for (int64_t i = 0; i < kBlock; ++i) output[block + i] = static_cast<float>(read<int8_t>(values + i)) * scale;
      }
      return;
    case SourceType::kQ4_0:  // float16 scale, 32 nibbles of value + 8
      for (int64_t block = 0; block < count; block += kBlock, p += 18) {
        const float scale = half_to_float(read<uint16_t>(p));
        unpack_nibbles(p + 2, scale, -8.0f * scale, output + block);
      }
      return;
    case SourceType::kQ4_1:  // float16 scale, float16 minimum, 32 nibbles
      for (int64_t block = 0; block < count; block += kBlock, p += 20) {
        unpack_nibbles(p + 4, half_to_float(read<uint16_t>(p)), half_to_float(read<uint16_t>(p + 2)), output + block);
      }
      return;
  }
}

}  // namespace fastserve
