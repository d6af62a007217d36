// Packing and unpacking, the same for every instruction set: only the width of a panel differs.
#include "backend/cpu/quantized.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/check.h"
#include "model/dequantize.h"

namespace fastserve::cpu {

namespace {

template <class T>
T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Blocks of one row, whose scales are its first bytes and whose values its last.
void pack_blocks(const QuantizedLayout& layout, const uint8_t* row, int64_t stored_bytes, int64_t output,
                 uint8_t* panel) {
  const bool bytes = layout.format == WeightFormat::kQ8_0;
  const int64_t values = bytes ? kBlockInputs : kBlockInputs / 2;
  for (int64_t block = 0; block < layout.groups(); ++block, row += stored_bytes, panel += layout.block_bytes()) {
    std::memcpy(panel + output * 2, row, 2);
    if (layout.format == WeightFormat::kQ4_1) std::memcpy(panel + (layout.panel + output) * 2, row + 2, 2);
    for (int64_t i = 0; i < values; i += 4) {
      uint32_t four = read<uint32_t>(row + stored_bytes - values + i);
      if (bytes) four ^= 0x80808080u;
      std::memcpy(panel + layout.head_bytes() + i * layout.panel + output * 4, &four, 4);
    }
  }
}

void pack_channel(const QuantizedLayout& layout, const float* row, int64_t output, uint8_t* panel) {
  float largest = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < layout.k; ++i) {
    largest = std::max(largest, std::fabs(row[i]));
    poison += row[i] * 0.0f;  // NaN as soon as a weight is infinite or NaN: the whole row is, then
  }
  const bool sound = poison == 0.0f;
  const float scale = sound ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
  std::memcpy(panel + output * 4, &scale, 4);
  uint8_t* values = panel + layout.head_bytes() + output * 4;
  for (int64_t i = 0; i < (layout.k + 3) / 4 * 4; ++i) {
    const float value = sound && scale > 0.0f && i < layout.k ? std::nearbyint(row[i] / scale) : 0.0f;
    values[i / 4 * 4 * layout.panel + i % 4] = static_cast<uint8_t>(static_cast<int>(value) + 128);
  }
}

}  // namespace

void check_quantized(WeightFormat format, int64_t k) {
  FS_CHECK(format == WeightFormat::kInt8 || k % kBlockInputs == 0, "a matrix held in GGUF's blocks has a multiple of ",
           kBlockInputs, " inputs, not ", k);
}

void check_quantized_source(WeightFormat format, SourceType type) {
  const bool fits = format == WeightFormat::kInt8 ||
                    (format == WeightFormat::kQ8_0 && (type == SourceType::kQ8_0 || type == SourceType::kQ8_1)) ||
                    (format == WeightFormat::kQ4_0 && type == SourceType::kQ4_0) ||
                    (format == WeightFormat::kQ4_1 && type == SourceType::kQ4_1);
  FS_CHECK(fits, "a matrix held in GGUF's blocks takes only rows of its own type");
}

void pack_quantized(const QuantizedLayout& layout, SourceType type, const void* rows, int64_t count, int64_t first,
                    uint8_t* panel) {
  for (int64_t i = 0; i < count; ++i) {
    if (layout.format == WeightFormat::kInt8) {
      pack_channel(layout, static_cast<const float*>(rows) + i * layout.k, first + i, panel);
    } else {
      const uint8_t* row = static_cast<const uint8_t*>(rows) + i * source_bytes(type, layout.k);
      pack_blocks(layout, row, block_bytes(type), first + i, panel);
    }
  }
}

void unpack_quantized(const QuantizedLayout& layout, const uint8_t* weight, int64_t row, float* output,
                      bool accumulate) {
  const uint8_t* panel = weight + row / layout.panel * layout.panel_bytes();
  const int64_t column = row % layout.panel;
  const auto put = [&](int64_t i, float value) { output[i] = accumulate ? output[i] + value : value; };
  // Byte i of this output, where `values` are a panel's or a block's.
  const auto byte = [&](const uint8_t* values, int64_t i) {
    return static_cast<int>(values[(i / 4 * layout.panel + column) * 4 + i % 4]);
  };
  if (layout.format == WeightFormat::kInt8) {
    const auto scale = read<float>(panel + column * 4);
    const uint8_t* values = panel + layout.head_bytes();
    for (int64_t i = 0; i < layout.k; ++i) put(i, static_cast<float>(byte(values, i) - 128) * scale);
    return;
  }
  for (int64_t k = 0; k < layout.k; k += kBlockInputs, panel += layout.block_bytes()) {
    const float scale = half_to_float(read<uint16_t>(panel + column * 2));
    const uint8_t* values = panel + layout.head_bytes();
    if (layout.format == WeightFormat::kQ8_0) {
      for (int64_t i = 0; i < kBlockInputs; ++i) put(k + i, static_cast<float>(byte(values, i) - 128) * scale);
      continue;
    }
    const bool minima = layout.format == WeightFormat::kQ4_1;
    const float offset = minima ? half_to_float(read<uint16_t>(panel + (layout.panel + column) * 2)) : -8.0f * scale;
    for (int64_t i = 0; i < kBlockInputs / 2; ++i) {
      put(k + i, static_cast<float>(byte(values, i) & 15) * scale + offset);
      put(k + kBlockInputs / 2 + i, static_cast<float>(byte(values, i) >> 4) * scale + offset);
    }
  }
}

}  // namespace fastserve::cpu
