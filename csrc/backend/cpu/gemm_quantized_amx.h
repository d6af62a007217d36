// Products of many rows with quantized weights on the tiles of AMX. The sum over a group is an integer and exact in any
// order, and what follows is done in the order of gemm_quantized.h: the bits are the same, so kernels may take turns.
//
// A group of 32 inputs is half a B tile deep and needs its sums stored, converted and scaled: about 36 cycles for 16
// rows of 16 outputs (16 for the product, 16 for the store beside it, 32 for four operations a row on two ports)
// against 88 (64 dot products and 24) with AVX-512. Of few rows the tile would be mostly empty.
#pragma once

#include "backend/cpu/amx.h"
#include "backend/cpu/gemm_quantized.h"

namespace fastserve::cpu::FS_ISA {

constexpr int64_t kAmxLeastRows = 8;
constexpr int64_t kQuantizedBlockRows = 256;            // whose operand stays in the L2 cache
constexpr int64_t kGroupBytes = kBlockInputs * kPanel;  // of weights, a byte each

template <class Format>
class QuantizedAmxTile {
 public:
  // Rows [row, row + 16), of which `count` exist, and outputs [half · 16, half · 16 + 16) of a panel, whose groups of
  // bytes begin at `values`, `step` bytes apart.
  QuantizedAmxTile(const QuantizedGemm& g, int64_t row, int64_t count, int64_t panel, int half, const uint8_t* values,
                   int64_t step)
      : g_(g),
        row_(row),
        count_(count),
        column_(panel * kPanel + half * kAmxOutputs),
        half_(half),
        head_(g.weight + panel * g.layout->panel_bytes()),
        values_(values + half * kAmxBytes),
        step_(step),
        operand_bytes_(g.layout->operand_bytes(sizeof(Quant))),
        operand_(g.operand + row * operand_bytes_),
        inputs_(operand_ + g.layout->operand_head(sizeof(Quant))) {}

  void run(Prefetch ahead) {
    const int64_t groups = g_.layout->groups();
    F32 acc[kAmxRows];
    for (F32& x : acc) x = set1(0.0f);
    multiply<0>(0);
    for (int64_t group = 0;; ahead.step()) {  // a group's sums are added while the next one's are on their way
      if (group + 1 < groups) multiply<1>(group + 1);
      add_group(sums_[0], group, acc);
      if (++group == groups) break;
      ahead.step();
      if (group + 1 < groups) multiply<0>(group + 1);
      add_group(sums_[1], group, acc);
      if (++group == groups) break;
    }
    finish(acc);
  }

 private:
  template <int Turn>
  void multiply(int64_t group) {
    amx_zero<Turn>();
    amx_load<6 + Turn>(operand_ + group * kBlockInputs, operand_bytes_);
    amx_load<4 + Turn>(values_ + group * step_, kPanel * 4);
    amx_dot_bytes<Turn, 6 + Turn, 4 + Turn>();
    amx_store<Turn>(sums_[Turn], kAmxBytes);
  }

  [[gnu::always_inline]] void add_group(const int32_t* sums, int64_t group, F32* acc) const {
    const char* inputs = inputs_ + group * sizeof(GroupInput);
    const uint8_t* block = head_ + (Format::kChannel ? 0 : group * g_.layout->block_bytes()) + half_ * kAmxOutputs * 2;
    const F32 scale = Format::kChannel ? set1(0.0f) : load_half(block);
    const F32 minimum = Format::kMinimum ? load_half(block + kPanel * 2) : set1(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r) {
      const auto& input = *reinterpret_cast<const GroupInput*>(inputs + r * operand_bytes_);
      __m512i sum = _mm512_load_si512(sums + r * kAmxOutputs);
      if constexpr (!Format::kMinimum) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(input.start));
      const F32 value = to_f32(Sum{sum});
      if constexpr (Format::kChannel) {
        acc[r] = fma(value, set1(input.scale), acc[r]);
      } else {
        acc[r] = fma(mul(value, set1(input.scale)), scale, acc[r]);
      }
      if constexpr (Format::kMinimum) acc[r] = fma(set1(__builtin_bit_cast(float, input.start)), minimum, acc[r]);
    }
  }

  void finish(const F32* acc) const {
    F32 scale = set1(1.0f);
    if constexpr (Format::kChannel) scale = load(reinterpret_cast<const float*>(head_) + half_ * kAmxOutputs);
    float* out = g_.output + row_ * g_.ld_output + column_;
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r, out += g_.ld_output) {
      if (r >= count_) return;
      F32 value = Format::kChannel ? mul(acc[r], scale) : acc[r];
      if (g_.bias != nullptr) value = add(value, load(g_.bias + column_));
      if (g_.accumulate) value = add(value, load(out));
      store(out, value);
    }
  }

  const QuantizedGemm& g_;
  const int64_t row_, count_, column_;
  const int half_;
  const uint8_t* const head_;
  const uint8_t* const values_;
  const int64_t step_, operand_bytes_;
  const char* const operand_;
  const char* const inputs_;
  alignas(64) int32_t sums_[2][kAmxRows * kAmxOutputs];
};

// A panel's nibbles as bytes, groups back to back.
inline void unpack_nibbles(const QuantizedLayout& layout, const uint8_t* panel, uint8_t* bytes) {
  const uint8_t* values = panel + layout.head_bytes();
  for (int64_t group = 0; group < layout.groups(); ++group, values += layout.block_bytes(), bytes += kGroupBytes) {
    for (int i = 0; i < kGroupBytes / 2; i += 64) {
      Nibbles low, high;
      load_nibbles(values + i, low, high);
      _mm512_store_si512(bytes + i, low.v);
      _mm512_store_si512(bytes + kGroupBytes / 2 + i, high.v);
    }
  }
}

template <class Format>
inline void quantized_amx_panels(const QuantizedGemm& g) {
  const QuantizedLayout& layout = *g.layout;
  // Tiles would read beyond the last group where it is not whole.
  if (g.m < kAmxLeastRows || layout.k % kBlockInputs != 0) return quantized_panels<Format>(g);
  amx_shape(kAmxRows, kBlockInputs / 2);
  for (int64_t first = 0; first < g.m; first += kQuantizedBlockRows) {
    const int64_t end = first + kQuantizedBlockRows < g.m ? first + kQuantizedBlockRows : g.m;
    const int64_t tiles = (end - first + kAmxRows - 1) / kAmxRows * 2;
    for (int64_t panel = g.first_panel; panel < g.last_panel; ++panel) {
      const uint8_t* weight = g.weight + panel * layout.panel_bytes();
      const uint8_t* values = weight + layout.head_bytes();
      int64_t step = Format::kChannel ? kGroupBytes : layout.block_bytes();
      if constexpr (Format::kParts == 2) {
        unpack_nibbles(layout, weight, g.scratch);
        values = g.scratch;
        step = kGroupBytes;
      }
      for (int64_t row = first; row < end; row += kAmxRows) {
        const int64_t count = end - row < kAmxRows ? end - row : kAmxRows;
        if (count < kAmxLeastRows) {
          quantized_rows<Format, 1, kQuantizedRows>(g, row, count < kQuantizedRows ? count : kQuantizedRows, panel, {});
          if (count > kQuantizedRows) {
            quantized_rows<Format, 1, kQuantizedRows>(g, row + kQuantizedRows, count - kQuantizedRows, panel, {});
          }
          continue;
        }
        for (int half = 0; half < 2; ++half) {
          const int64_t tile = (row - first) / kAmxRows * 2 + half;
          QuantizedAmxTile<Format>(g, row, count, panel, half, values, step).run(share_of_next(g, panel, tile, tiles));
        }
      }
    }
  }
}

inline void gemm_quantized_amx(const QuantizedGemm& g) {
  switch (g.layout->format) {
    case WeightFormat::kInt8:
      return quantized_amx_panels<ChannelFormat>(g);
    case WeightFormat::kQ8_0:
      return quantized_amx_panels<ByteFormat>(g);
    case WeightFormat::kQ4_0:
      return quantized_amx_panels<NibbleFormat>(g);
    default:
      return quantized_amx_panels<NibbleMinimumFormat>(g);
  }
}

}  // namespace fastserve::cpu::FS_ISA
