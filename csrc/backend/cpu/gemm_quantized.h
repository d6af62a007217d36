// Products with quantized weights. A row of activations is quantized too, each group of it to int8 by its own maximum;
// the products of a group are summed in integers, which is exact in any order, and scaled and added to the output in
// float32, groups ascending. So a row's result is one chain of operations, whatever the number of rows in the call.
#pragma once

#include "backend/cpu/gemm.h"
#include "backend/cpu/quantized.h"
#include "backend/cpu/simd.h"

#if defined(__AVX512VNNI__)
#include "backend/cpu/dot_vnni.h"
#elif defined(__AVX512BW__)
#include "backend/cpu/dot_avx512.h"
#elif defined(__AVX2__)
#include "backend/cpu/dot_avx2.h"
#else
#include "backend/cpu/dot_portable.h"
#endif

namespace fastserve::cpu::FS_ISA {

constexpr int kStepBytes = kWidth * 4;  // four inputs of a vector of outputs

// A weight format: kLoads vectors of bytes hold a group of each output. Such a vector is kParts steps of four inputs;
// part p of load i belongs to the inputs from (i + p · kLoads) · 4 on. kOffset is what values are stored with, kMinimum
// whether blocks have one. A group is summed in a Running, from begin(start) to end(running, start).
struct ByteFormat {
  static constexpr int kLoads = kBlockInputs / 4, kParts = 1, kOffset = 128;
  static constexpr bool kChannel = false, kMinimum = false;
  struct Loaded {
    Bytes part[1];
  };
  static Loaded load_weights(const uint8_t* p) { return {{load_bytes(p)}}; }
  using Running = Sum;
  static Running begin(int32_t start) { return start_sum(start); }
  static Sum end(Running running, int32_t) { return running; }
};
struct ChannelFormat : ByteFormat {
  static constexpr bool kChannel = true;
};
struct NibbleFormat {
  static constexpr int kLoads = kBlockInputs / 8, kParts = 2, kOffset = 8;
  static constexpr bool kChannel = false, kMinimum = false;
  struct Loaded {
    Nibbles part[2];
  };
  static Loaded load_weights(const uint8_t* p) {
    Loaded loaded;
    load_nibbles(p, loaded.part[0], loaded.part[1]);
    return loaded;
  }
  using Running = NibbleSum;
  static Running begin(int32_t start) { return begin_nibbles(start); }
  static Sum end(Running running, int32_t start) { return end_nibbles(running, start); }
};
struct NibbleMinimumFormat : NibbleFormat {
  static constexpr int kOffset = 0;
  static constexpr bool kMinimum = true;
};

template <class Format, int Rows, int Panels>
inline void quantized_tile(const QuantizedGemm& g, int64_t row, int64_t panel, Prefetch ahead) {
  constexpr int kVectors = Panels * kVectorsPerPanel;
  const QuantizedLayout& layout = *g.layout;
  const int64_t panel_bytes = layout.panel_bytes(), operand_bytes = layout.operand_bytes(sizeof(Quant));
  const int64_t operand_head = layout.operand_head(sizeof(Quant)), groups = layout.groups();
  const uint8_t* head = g.weight + panel * panel_bytes;
  const uint8_t* values = head + layout.head_bytes();
  const char* operand = g.operand + row * operand_bytes;
  F32 acc[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = set1(0.0f);
  }
  for (int64_t group = 0; group < groups; ++group) {
    ahead.step();
    const auto* a = reinterpret_cast<const Quant*>(operand) + group * kBlockInputs;
    const auto* inputs = reinterpret_cast<const GroupInput*>(operand + operand_head) + group;
    const auto input = [&](int r) {
      return *reinterpret_cast<const GroupInput*>(reinterpret_cast<const char*>(inputs) + r * operand_bytes);
    };
    const auto start = [&](int r) { return Format::kMinimum ? 0 : input(r).start; };
    typename Format::Running running[Rows][kVectors];
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kVectors; ++v) running[r][v] = Format::begin(start(r));
    }
    const auto sum = [&](int r, int v)
                         __attribute__((always_inline)) { return to_f32(Format::end(running[r][v], start(r))); };
    const auto add_load = [&](int i) __attribute__((always_inline)) {
      typename Format::Loaded w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = Format::load_weights(values + (v / kVectorsPerPanel) * panel_bytes +
                                    (i * kVectorsPerPanel + v % kVectorsPerPanel) * kStepBytes);
      }
      for (int p = 0; p < Format::kParts; ++p) {
        for (int r = 0; r < Rows; ++r) {
          const auto* four = reinterpret_cast<const Quant*>(reinterpret_cast<const char*>(a) + r * operand_bytes) +
                             (i + p * Format::kLoads) * 4;
          for (int v = 0; v < kVectors; ++v) running[r][v] = dot(running[r][v], four, w[v].part[p]);
        }
      }
    };
    if (!Format::kChannel || (group + 1) * kBlockInputs <= layout.k) {
      for (int i = 0; i < Format::kLoads; ++i) add_load(i);
    } else {
      for (int i = 0; i < (layout.k - group * kBlockInputs + 3) / 4; ++i) add_load(i);
    }
    if constexpr (Format::kChannel) {
      for (int r = 0; r < Rows; ++r) {
        const F32 scale = set1(input(r).scale);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(sum(r, v), scale, acc[r][v]);
      }
      values += Format::kLoads * kVectorsPerPanel * kStepBytes;
    } else {
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* block = head + (v / kVectorsPerPanel) * panel_bytes + (v % kVectorsPerPanel) * kWidth * 2;
        const F32 scale = load_half(block);
        for (int r = 0; r < Rows; ++r) {
          acc[r][v] = fma(mul(sum(r, v), set1(input(r).scale)), scale, acc[r][v]);
        }
        if constexpr (Format::kMinimum) {
          const F32 minimum = load_half(block + kPanel * 2);
          for (int r = 0; r < Rows; ++r) {
            acc[r][v] = fma(set1(__builtin_bit_cast(float, input(r).start)), minimum, acc[r][v]);
          }
        }
      }
      head += layout.block_bytes();
      values += layout.block_bytes();
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = panel * kPanel + v * kWidth;
      float* out = g.output + (row + r) * g.ld_output + column;
      F32 value = acc[r][v];
      if constexpr (Format::kChannel) {
        const uint8_t* scales = head + (v / kVectorsPerPanel) * panel_bytes + (v % kVectorsPerPanel) * kWidth * 4;
        value = mul(value, load(reinterpret_cast<const float*>(scales)));
      }
      if (g.bias != nullptr) value = add(value, load(g.bias + column));
      if (g.accumulate) value = add(value, load(out));
      store(out, value);
    }
  }
}

template <class Format, int Panels, int Rows>
inline void quantized_rows(const QuantizedGemm& g, int64_t row, int64_t rows, int64_t panel, Prefetch ahead) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      quantized_tile<Format, Rows, Panels>(g, row, panel, ahead);
    } else {
      quantized_rows<Format, Panels, Rows - 1>(g, row, rows, panel, ahead);
    }
  }
}

// What tile `tile` of the `tiles` that share the work has to fetch of the panel after `panel`.
inline Prefetch share_of_next(const QuantizedGemm& g, int64_t panel, int64_t tile, int64_t tiles) {
  const int64_t next = panel + 1 < g.last_panel ? panel + 1 : g.next_panel;
  if (next >= g.layout->panels()) return {};
  const int64_t bytes = g.layout->panel_bytes(), groups = g.layout->groups();
  const int64_t step = (bytes + tiles * groups * 64 - 1) / (tiles * groups * 64) * 64;
  const char* start = reinterpret_cast<const char*>(g.weight + next * bytes) + tile * groups * step;
  return {start, step};
}

template <class Format>
inline void quantized_panels(const QuantizedGemm& g) {
  constexpr int kPairRows = kQuantizedRows / 2;
  for (int64_t panel = g.first_panel; panel < g.last_panel;) {
    if (g.m <= kPairRows && panel + 2 <= g.last_panel) {
      quantized_rows<Format, 2, kPairRows>(g, 0, g.m, panel, {});
      panel += 2;
      continue;
    }
    // Tiles of about as many rows each: those of few are slower than their share.
    const int64_t tiles = (g.m + kQuantizedRows - 1) / kQuantizedRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * g.m / tiles, end = (tile + 1) * g.m / tiles;
      // Of several tiles only the first waits for memory; the last two fetch the next panel.
      Prefetch ahead;
      if (tiles > 1 && tile >= tiles - 2) ahead = share_of_next(g, panel, tile - (tiles - 2), 2);
      quantized_rows<Format, 1, kQuantizedRows>(g, row, end - row, panel, ahead);
    }
    ++panel;
  }
}

inline void gemm_quantized(const QuantizedGemm& g) {
  switch (g.layout->format) {
    case WeightFormat::kInt8:
      return quantized_panels<ChannelFormat>(g);
    case WeightFormat::kQ8_0:
      return quantized_panels<ByteFormat>(g);
    case WeightFormat::kQ4_0:
      return quantized_panels<NibbleFormat>(g);
    default:
      return quantized_panels<NibbleMinimumFormat>(g);
  }
}

// One group to values and how to use them. `poison` becomes NaN where an input is not finite.
inline void quantize_group(const float* x, Quant* values, GroupInput& input, WeightFormat format, F32& poison) {
  F32 largest = set1(0.0f);
  for (int i = 0; i < kBlockInputs; i += kWidth) {
    const F32 v = load(x + i);
    largest = max(largest, abs(v));
    poison = fma(v, set1(0.0f), poison);
  }
  const float maximum = group_max(largest);
  // Below the threshold 127 / maximum may be infinite, and the group is nothing to any sum.
  const bool vanishes = !(maximum >= 0x1p-100f);
  const float inverse = vanishes ? 0.0f : 127.0f / maximum;
  F32 total = set1(0.0f);
  for (int i = 0; i < kBlockInputs; i += kWidth) {
    const F32 value = round(mul(load(x + i), set1(inverse)));
    total = add(total, value);
    store_quants(values + i, value);
  }
  const float sum = group_sum(total);
  input.scale = vanishes ? 0.0f : maximum / 127.0f;
  if (format == WeightFormat::kQ4_1) {
    input.start = __builtin_bit_cast(int32_t, sum* input.scale);
  } else {
    const int32_t offset = format == WeightFormat::kQ4_0 ? NibbleFormat::kOffset
                           : kSignedBytes                ? 0
                                                         : ByteFormat::kOffset;
    input.start = sum == sum ? -offset * static_cast<int32_t>(sum) : 0;
  }
}

inline void quantize_input(const QuantizedLayout& layout, const float* x, void* output) {
  auto* values = static_cast<Quant*>(output);
  auto* inputs = reinterpret_cast<GroupInput*>(static_cast<char*>(output) + layout.operand_head(sizeof(Quant)));
  const WeightFormat format = layout.format;
  const int64_t groups = layout.groups(), whole = layout.k / kBlockInputs;
  F32 poison = set1(0.0f);
  for (int64_t g = 0; g < whole; ++g) {
    quantize_group(x + g * kBlockInputs, values + g * kBlockInputs, inputs[g], format, poison);
  }
  if (whole < groups) {
    float last[kBlockInputs] = {};
    for (int64_t i = whole * kBlockInputs; i < layout.k; ++i) last[i - whole * kBlockInputs] = x[i];
    quantize_group(last, values + whole * kBlockInputs, inputs[whole], format, poison);
  }
  if (reduce_add(poison) == 0.0f) return;
  for (int64_t g = 0; g < groups; ++g) inputs[g].scale = __builtin_nanf("");  // the row shows that it is not finite
}

}  // namespace fastserve::cpu::FS_ISA
