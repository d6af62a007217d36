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

// A weight format: Operand is the type of the other factor and kStep the number of inputs one step consumes, in kParts
// parts. load_weights<part>(weights of one step of one vector of a panel) and step<part>(acc, a row's inputs of the
// step, those weights) advance one row by a part. Parts are loaded one after the other, as registers are few.
struct Float32Format {
  using Weight = float;
  using Operand = float;
  static constexpr int kStep = 1, kParts = 1;
  using Loaded = F32;
  template <int>
  static Loaded load_weights(const float* p) {
    return load(p);
  }
  template <int>
  static F32 step(F32 acc, const float* a, Loaded w) {
    return fma(set1(a[0]), w, acc);
  }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, added to float32 in one instruction.
struct BFloat16Format {
  using Weight = Bf16;
  using Operand = Bf16;
  static constexpr int kStep = 2, kParts = 1;
  struct Loaded {
    __m512bh w;
  };
  template <int>
  static Loaded load_weights(const Bf16* p) {
    return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))};
  }
  template <int>
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
  static constexpr int kStep = 2, kParts = 2;
  using Loaded = F32;
  template <int Part>
  static Loaded load_weights(const Bf16* p) {
    return Part == 0 ? load_even(p) : load_odd(p);
  }
  template <int Part>
  static F32 step(F32 acc, const float* a, Loaded w) {
    return fma(set1(a[Part]), w, acc);
  }
};
#endif

constexpr int64_t kStreamAhead = 4096;  // bytes between a load from memory and its prefetch

// Weights to fetch into the L2 cache meanwhile: `bytes` from `next` on at every step.
struct Prefetch {
  const char* next = nullptr;
  int64_t bytes = 0;

  [[gnu::always_inline]] void step() {
    for (const char* end = next + bytes; next < end; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Keeps the compiler from reading ahead of here what lies at p, which would take registers that it does not have.
template <class T>
[[gnu::always_inline]] inline void read_from_here(const T*& p) {
  asm volatile("" : "+r"(p));
}

// One step of a tile, from `Part` on: all its rows meet the weights of a part before the next is loaded.
template <class Format, int Rows, int Vectors, int Part>
[[gnu::always_inline]] inline void tile_step(F32 (&acc)[Rows][Vectors], const typename Format::Weight* weight,
                                             int64_t panel_elements, const typename Format::Operand* operand) {
  if constexpr (Part < Format::kParts) {
    if constexpr (Part > 0) read_from_here(weight);
    typename Format::Loaded w[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const int64_t in_panel = (v % kVectorsPerPanel) * kWidth * Format::kStep;
      w[v] = Format::template load_weights<Part>(weight + (v / kVectorsPerPanel) * panel_elements + in_panel);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        acc[r][v] = Format::template step<Part>(acc[r][v], operand + r * Format::kStep, w[v]);
      }
    }
    tile_step<Format, Rows, Vectors, Part + 1>(acc, weight, panel_elements, operand);
  }
}

// Rows × Panels tiles of the output, all accumulators in registers.
template <class Format, int Rows, int Panels>
inline void gemm_tile(const PanelGemm& g, int64_t row, int64_t panel, Prefetch ahead) {
  constexpr int kVectors = Panels * kVectorsPerPanel;
  const int64_t panel_elements = g.layout->panel_elements(), group_step = g.group_rows * Format::kStep;
  const auto* weight = static_cast<const typename Format::Weight*>(g.weight) + panel * panel_elements;
  const auto* operand = static_cast<const typename Format::Operand*>(g.operand) + row * g.layout->k_padded;
  F32 acc[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = set1(0.0f);
  }
  for (int64_t k = 0; k < g.layout->k_padded; k += Format::kStep) {
    ahead.step();
    tile_step<Format, Rows, kVectors, 0>(acc, weight, panel_elements, operand);
    weight += kVectorsPerPanel * kWidth * Format::kStep;
    operand += group_step;
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
inline void gemm_rows(const PanelGemm& g, int64_t row, int64_t rows, int64_t panel, Prefetch ahead) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      gemm_tile<Format, Rows, Panels>(g, row, panel, ahead);
    } else {
      gemm_rows<Format, Panels, Rows - 1>(g, row, rows, panel, ahead);
    }
  }
}

template <class Format>
inline void gemm_panels(const PanelGemm& g) {
  // Few rows leave registers free for a second panel, which hides the latency of the multiply-add chains.
  constexpr int kPairRows = kMaxRows / 2;
  // A step fetches one line of the cache: so many tiles together fetch a panel.
  constexpr int64_t kStepLines = kPanel * Format::kStep * sizeof(typename Format::Weight) / 64;
  constexpr int64_t kFetchers = kStepLines == 0 ? 1 : kStepLines;
  for (int64_t panel = g.first_panel; panel < g.last_panel;) {
    if (g.m <= kPairRows && panel + 2 <= g.last_panel) {
      gemm_rows<Format, 2, kPairRows>(g, 0, g.m, panel, {});
      panel += 2;
      continue;
    }
    // Of several tiles only the first waits for memory; the last ones fetch the next panel.
    const int64_t next = panel + 1 < g.last_panel ? panel + 1 : g.next_panel;
    const int64_t bytes = g.layout->panel_elements() * static_cast<int64_t>(sizeof(typename Format::Weight));
    const int64_t tiles = (g.m + g.group_rows - 1) / g.group_rows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Prefetch ahead;
      const int64_t fetcher = tile - (tiles - kFetchers);
      if (tiles == 1) {
        ahead = {static_cast<const char*>(g.weight) + panel * bytes + kStreamAhead, kFetchers * 64};
      } else if (fetcher >= 0 && next < g.layout->panels()) {
        ahead = {static_cast<const char*>(g.weight) + next * bytes + fetcher * bytes / kFetchers, 64};
      }
      const int64_t row = tile * g.group_rows, left = g.m - row;
      gemm_rows<Format, 1, kMaxRows>(g, row, left < g.group_rows ? left : g.group_rows, panel, ahead);
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
// Up to 32 inputs, rounded, and zeros.
inline __m512i round_inputs(const float* input, int64_t count) {
  const uint32_t lanes = count >= 32 ? ~0u : (1u << count) - 1;
  const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), input);
  const __m512 second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), input + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// The same 32 inputs of four neighbouring rows of a group, from their first pair on.
inline void place_four(const float* input, int64_t ld_input, int64_t group_rows, Bf16* out) {
  __m512i row[4];
  for (int r = 0; r < 4; ++r) row[r] = round_inputs(input + r * ld_input, 32);
  const __m512i low[2] = {_mm512_unpacklo_epi32(row[0], row[1]), _mm512_unpacklo_epi32(row[2], row[3])};
  const __m512i high[2] = {_mm512_unpackhi_epi32(row[0], row[1]), _mm512_unpackhi_epi32(row[2], row[3])};
  const __m512i pairs[4] = {// of all four rows: pairs i, i + 4, i + 8 and i + 12
                            _mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                            _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
  for (int i = 0; i < 4; ++i) {
    const auto place = [&](int pair, __m128i four) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + pair * group_rows * 2), four);
    };
    place(i, _mm512_castsi512_si128(pairs[i]));
    place(i + 4, _mm512_extracti32x4_epi32(pairs[i], 1));
    place(i + 8, _mm512_extracti32x4_epi32(pairs[i], 2));
    place(i + 12, _mm512_extracti32x4_epi32(pairs[i], 3));
  }
}

// All whole 32 inputs of the rows; returns how many those are.
inline int64_t place_whole(const float* input, int64_t ld_input, int64_t inputs, int64_t rows, int64_t group_rows,
                           Bf16* group) {
  const int64_t whole = inputs / 32 * 32;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    for (int64_t k = 0; k < whole; k += 32) {
      place_four(input + row * ld_input + k, ld_input, group_rows, group + k * group_rows + row * 2);
    }
  }
  for (; row < rows; ++row) {
    for (int64_t k = 0; k < whole; k += 32) {
      alignas(64) int pairs[16];
      _mm512_store_si512(pairs, round_inputs(input + row * ld_input + k, 32));
      Bf16* out = group + k * group_rows + row * 2;
      if (group_rows == 1) {
        __builtin_memcpy(out, pairs, sizeof pairs);
      } else {
        for (int i = 0; i < 16; ++i) __builtin_memcpy(out + i * group_rows * 2, &pairs[i], sizeof pairs[i]);
      }
    }
  }
  return whole;
}
#endif

template <class Format, class Round>
inline void place_group(const PanelLayout& layout, const float* input, int64_t ld_input, int64_t rows,
                        int64_t group_rows, typename Format::Operand* group, Round round) {
  constexpr int kStep = Format::kStep;
  int64_t placed = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(typename Format::Operand) == sizeof(Bf16)) {
    placed = place_whole(input, ld_input, layout.k, rows, group_rows, group);
  }
#endif
  for (int64_t row = 0; row < rows; ++row) {
    auto* out = group + placed * group_rows + row * kStep;
    for (int64_t k = placed; k < layout.k_padded; k += kStep, out += group_rows * kStep) {
      for (int i = 0; i < kStep; ++i) out[i] = k + i < layout.k ? round(input[row * ld_input + k + i]) : round(0.0f);
    }
  }
}

inline void place_rows(const PanelLayout& layout, const float* input, int64_t ld_input, int64_t rows,
                       int64_t group_rows, void* group) {
  if (layout.dtype == DType::kFloat32) {
    place_group<Float32Format>(layout, input, ld_input, rows, group_rows, static_cast<float*>(group),
                               [](float x) { return x; });
  } else {
    using Operand = BFloat16Format::Operand;
    place_group<BFloat16Format>(layout, input, ld_input, rows, group_rows, static_cast<Operand*>(group), [](float x) {
      if constexpr (sizeof(Operand) == 2) {
        return to_bf16(x);
      } else {
        return to_float(to_bf16(x));
      }
    });
  }
}

}  // namespace fastserve::cpu::FS_ISA
