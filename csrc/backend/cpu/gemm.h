// Packed matrix products. Every output element is one chain of multiply-adds over k in ascending order, whatever the
// number of rows in the call: that is what lets a job's tokens not depend on its batch.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

constexpr int kVectorsPerPanel = 2;
constexpr int64_t kPanel = kVectorsPerPanel * kWidth;
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 12 × 2 accumulators, 2 weights, broadcasts: 32 registers
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;  // of 16 registers
#else
constexpr int kMaxRows = 4;
#endif

// A weight format: Operand is the type of the other factor, kStep the number of inputs one step consumes, and
// step(acc, operand row at the step's first input, weights of one step of one panel) advances one row.
struct Float32Format {
  using Weight = float;
  using Operand = float;
  static constexpr int kStep = 1;
  struct Loaded {
    F32 w;
  };
  static Loaded load_weights(const float* p) { return {load(p)}; }
  static F32 step(F32 acc, const float* a, const Loaded& w) { return fma(set1(a[0]), w.w, acc); }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, added to float32 in one instruction.
struct BFloat16Format {
  using Weight = Bf16;
  using Operand = Bf16;
  static constexpr int kStep = 2;
  struct Loaded {
    __m512bh w;
  };
  static Loaded load_weights(const Bf16* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
  static F32 step(F32 acc, const Bf16* a, const Loaded& w) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), w.w)};
  }
};
#else
// The operand is rounded to bfloat16 but kept as float32: products are exact, sums are float32.
struct BFloat16Format {
  using Weight = Bf16;
  using Operand = float;
  static constexpr int kStep = 2;
  struct Loaded {
    F32 even, odd;
  };
  static Loaded load_weights(const Bf16* p) {
    Loaded w;
    load_pairs(p, w.even, w.odd);
    return w;
  }
  static F32 step(F32 acc, const float* a, const Loaded& w) {
    return fma(set1(a[1]), w.odd, fma(set1(a[0]), w.even, acc));
  }
};
#endif

// Rows × Panels tiles of the output, all accumulators in registers.
template <class Format, int Rows, int Panels>
inline void gemm_tile(const PanelGemm& g, int64_t row, int64_t panel) {
  constexpr int kVectors = Panels * kVectorsPerPanel;
  constexpr int kElements = kWidth * Format::kStep;  // of one vector of weights
  const int64_t panel_elements = g.layout->panel_elements();
  const auto* weight = static_cast<const typename Format::Weight*>(g.weight) + panel * panel_elements;
  const auto* operand = static_cast<const typename Format::Operand*>(g.operand) + row * g.ld_operand;
  F32 acc[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = set1(0.0f);
  }
  for (int64_t k = 0; k < g.layout->k_padded; k += Format::kStep) {
    typename Format::Loaded w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] =
          Format::load_weights(weight + (v / kVectorsPerPanel) * panel_elements + (v % kVectorsPerPanel) * kElements);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Format::step(acc[r][v], operand + r * g.ld_operand + k, w[v]);
    }
    weight += kVectorsPerPanel * kElements;
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = panel * kPanel + v * kWidth;
      float* out = g.output + (row + r) * g.ld_output + column;
      F32 value = acc[r][v];
      if (g.bias != nullptr) value = add(value, load(g.bias + column));
      if (g.accumulate) value = add(value, load(out));
      store(out, value);
    }
  }
}

template <class Format, int Panels, int Rows>
inline void gemm_rows(const PanelGemm& g, int64_t row, int64_t rows, int64_t panel) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      gemm_tile<Format, Rows, Panels>(g, row, panel);
    } else {
      gemm_rows<Format, Panels, Rows - 1>(g, row, rows, panel);
    }
  }
}

template <class Format>
inline void gemm_panels(const PanelGemm& g) {
  // Few rows leave registers free for a second panel, which hides the latency of the multiply-add chains.
  constexpr int kPairRows = kMaxRows / 2;
  for (int64_t panel = g.first_panel; panel < g.last_panel;) {
    if (g.m <= kPairRows && panel + 2 <= g.last_panel) {
      gemm_rows<Format, 2, kPairRows>(g, 0, g.m, panel);
      panel += 2;
      continue;
    }
    for (int64_t row = 0; row < g.m; row += kMaxRows) {
      gemm_rows<Format, 1, kMaxRows>(g, row, g.m - row < kMaxRows ? g.m - row : kMaxRows, panel);
    }
    ++panel;
  }
}

inline void gemm(const PanelGemm& g) {
  if (g.layout->dtype == DType::kFloat32) {
    gemm_panels<Float32Format>(g);
  } else {
    gemm_panels<BFloat16Format>(g);
  }
}

// Places `count` float32 rows [count][k] at outputs [first, first + count) of one panel.
inline void pack_panel(const PanelLayout& layout, const float* rows, int64_t count, int64_t first, void* panel) {
  for (int64_t k = 0; k < layout.k; ++k) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = rows[i * layout.k + k];
      if (layout.dtype == DType::kFloat32) {
        static_cast<float*>(panel)[k * kPanel + first + i] = value;
      } else {
        static_cast<Bf16*>(panel)[(k / 2 * kPanel + first + i) * 2 + k % 2] = to_bf16(value);
      }
    }
  }
}

inline void unpack_row(const PanelLayout& layout, const void* weight, int64_t row, float* output, bool accumulate) {
  const int64_t base = row / kPanel * layout.panel_elements();
  const int64_t column = row % kPanel;
  for (int64_t k = 0; k < layout.k; ++k) {
    float value;
    if (layout.dtype == DType::kFloat32) {
      value = static_cast<const float*>(weight)[base + k * kPanel + column];
    } else {
      value = to_float(static_cast<const Bf16*>(weight)[base + (k / 2 * kPanel + column) * 2 + k % 2]);
    }
    output[k] = accumulate ? output[k] + value : value;
  }
}

#if defined(__AVX512BF16__)
// Rounds up to 32 inputs and stores 32, the rest zeros.
inline void round_inputs(const float* input, int64_t count, void* output) {
  const uint32_t lanes = count >= 32 ? ~0u : (1u << count) - 1;
  const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), input);
  const __m512 second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), input + 16);
  _mm512_storeu_si512(output, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
#endif

// Elements between the rows of an operand: without a gap, rows of 2,048 inputs would all want the same few lines of the
// L1 cache.
constexpr int64_t kOperandGap = 64 / sizeof(BFloat16Format::Operand);

// Places row `row` of the m rows of a bfloat16 product's operand, which is [m][k_padded + kOperandGap] here.
inline void place_row(const PanelLayout& layout, const float* input, int64_t row, int64_t, void* operand) {
  auto* out = static_cast<BFloat16Format::Operand*>(operand) + row * (layout.k_padded + kOperandGap);
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 32 <= layout.k; i += 32) round_inputs(input + i, 32, out + i);
#endif
  for (; i < layout.k; ++i) {
    if constexpr (sizeof(BFloat16Format::Operand) == 2) {
      reinterpret_cast<Bf16*>(out)[i] = to_bf16(input[i]);
    } else {
      reinterpret_cast<float*>(out)[i] = to_float(to_bf16(input[i]));
    }
  }
  for (; i < layout.k_padded; ++i) out[i] = {};
}

}  // namespace fastserve::cpu::FS_ISA
