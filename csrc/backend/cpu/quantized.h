// Weight matrices that stay quantized: how they lie in memory, and the work of a product with one.
#pragma once

#include <cstdint>

#include "backend/backend.h"

namespace fastserve::cpu {

// Inputs of GGUF's blocks, and of the groups of activations that share a scale, per-channel weights included: with 64,
// SmolLM2's perplexity in int8 grew by 1.5 instead of 0.7 percent, because a group with an outlier loses the others.
constexpr int64_t kBlockInputs = 32;

// Panels of `panel` neighbouring outputs, back to back and each a multiple of 64 bytes, so that a product reads them
// from front to back. A panel:
//   int8:              float32 scales [panel], then per four inputs the bytes [panel][4], of value + 128;
//   q8_0, q4_0, q4_1:  per block of 32 inputs the float16 scales [panel], q4_1's float16 minima [panel], and the
//                      block's own bytes, four of each output in turn: [8 or 4][panel][4]. q8_0 holds value + 128.
// Bytes are unsigned because the dot products of AVX-512 multiply unsigned by signed, and the signed factor is then
// the row's, whose sums correct for the offset. Padding outputs have scale 0.
struct QuantizedLayout {
  WeightFormat format;
  int64_t n, k;
  int64_t panel;

  [[gnu::always_inline]] int64_t groups() const { return (k + kBlockInputs - 1) / kBlockInputs; }
  // Scales and minima, of the panel for int8, else of a block.
  [[gnu::always_inline]] int64_t head_bytes() const {
    return panel * (format == WeightFormat::kInt8 || format == WeightFormat::kQ4_1 ? 4 : 2);
  }
  // Head and values of one block of a panel; not for int8.
  [[gnu::always_inline]] int64_t block_bytes() const {
    return head_bytes() + panel * (format == WeightFormat::kQ8_0 ? kBlockInputs : kBlockInputs / 2);
  }
  [[gnu::always_inline]] int64_t panel_bytes() const {
    const int64_t bytes =
        format == WeightFormat::kInt8 ? head_bytes() + (k + 3) / 4 * 4 * panel : groups() * block_bytes();
    return (bytes + 63) / 64 * 64;
  }
  [[gnu::always_inline]] int64_t panels() const { return (n + panel - 1) / panel; }

  // A row of activations: values [groups][32] of `value_bytes` each, then a GroupInput for each group.
  [[gnu::always_inline]] int64_t operand_head(int64_t value_bytes) const {
    return (groups() * kBlockInputs * value_bytes + 63) / 64 * 64;
  }
  [[gnu::always_inline]] int64_t operand_bytes(int64_t value_bytes) const {
    return (operand_head(value_bytes) + groups() * 8 + 63) / 64 * 64;
  }
};

// What turns the integer sum over a group into a number.
struct GroupInput {
  float scale;
  // Where the integer sum starts, which undoes the offset of the weights; for q4_1 scale · Σ values, as float32.
  int32_t start;
};

// Panels [first_panel, last_panel) of output = operand · weightᵀ (+ bias) (+ output).
struct QuantizedGemm {
  const QuantizedLayout* layout;
  const uint8_t* weight;  // all panels
  const char* operand;    // [m rounded up to 16] rows as quantize_input left them
  const float* bias;      // [n] padded, or null
  float* output;          // [m][ld_output]
  int64_t ld_output;
  int64_t m;
  int64_t first_panel, last_panel;
  int64_t next_panel;  // which the caller will probably want next, or panels() if none
  bool accumulate;
  uint8_t* scratch;  // a byte for each weight of a panel, exclusive to the caller
};

// Throws unless a matrix of `format` can have k inputs, and unless rows of `type` can become it.
void check_quantized(WeightFormat format, int64_t k);
void check_quantized_source(WeightFormat format, SourceType type);

// Places `count` rows at outputs [first, first + count) of one panel. Source rows of blocks keep their bits; for int8,
// `rows` are float32, and every row gets the scale max |w| / 127.
void pack_quantized(const QuantizedLayout& layout, SourceType type, const void* rows, int64_t count, int64_t first,
                    uint8_t* panel);
// output (+)= row of the matrix, as float32.
void unpack_quantized(const QuantizedLayout& layout, const uint8_t* weight, int64_t row, float* output,
                      bool accumulate);

}  // namespace fastserve::cpu
