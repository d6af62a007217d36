// Products with bfloat16 weights on the tiles of AMX. The panels of gemm.h are B tiles already: 16 pairs of inputs of
// 16 outputs are 16 rows of 64 bytes, two tiles side by side. A tile product takes the same time for one row as for
// sixteen, so it serves decode as well as prefill, and every row count has the same order of additions.
#pragma once

#include "backend/cpu/amx.h"
#include "backend/cpu/gemm.h"

namespace fastserve::cpu::FS_ISA {

constexpr int64_t kOperandStep = kAmxRows * kAmxBytes;  // of one A tile
constexpr int64_t kWeightStep = kAmxRows * kPanel * 4;  // of the two B tiles of a panel and 32 inputs
static_assert(kPanel == 2 * kAmxOutputs);

// A group of the operand is A tiles, so that loads of a tile are of 16 neighbouring lines.
inline void place_amx_rows(const PanelLayout& layout, const float* input, int64_t ld_input, int64_t rows,
                           int64_t group_rows, void* group) {
  if (layout.dtype == DType::kFloat32) return place_rows(layout, input, ld_input, rows, group_rows, group);
  for (int64_t row = 0; row < rows; ++row, input += ld_input) {
    char* out = static_cast<char*>(group) + row * kAmxBytes;
    for (int64_t k = 0; k < layout.k; k += kAmxInputs, out += group_rows * kAmxBytes) {
      _mm512_storeu_si512(out, round_inputs(input + k, layout.k - k));
    }
  }
}

template <int Heights, int Panels>
class AmxTile {
  static_assert(Heights * Panels <= 2);

 public:
  // Rows [row, row + count) of panels [panel, panel + Panels).
  static void run(const PanelGemm& g, int64_t row, int64_t count, int64_t panel, Prefetch& ahead) {
    const int64_t rows = g.group_rows, operand_step = rows * kAmxBytes;
    const int64_t panel_bytes = g.layout->panel_elements() * 2, height_bytes = kAmxRows * g.layout->k_padded * 2;
    const int64_t first = g.first_input / kAmxInputs, last = g.last_input / kAmxInputs;
    const char* a = static_cast<const char*>(g.operand) + row * g.layout->k_padded * 2 + first * operand_step;
    const char* b = static_cast<const char*>(g.weight) + panel * panel_bytes + first * kWeightStep;
    const char* next = ahead.next;
    const int64_t ahead_bytes = ahead.bytes;
    start(g, row, panel);
    for (int64_t step = first; step < last; ++step, a += operand_step, b += kWeightStep) {
      for (const char* end = next + ahead_bytes; next < end; next += 64) {
        __builtin_prefetch(next, 0, 2);
        if constexpr (Panels == 2) __builtin_prefetch(next + panel_bytes, 0, 2);
      }
      amx_load<6>(a, kAmxBytes);
      amx_load<4>(b, kPanel * 4);
      amx_dot_bf16<0, 6, 4>();
      amx_load<5>(b + kAmxBytes, kPanel * 4);
      amx_dot_bf16<1, 6, 5>();
      if constexpr (Heights == 2) {
        amx_load<7>(a + height_bytes, kAmxBytes);
        amx_dot_bf16<2, 7, 4>();
        amx_dot_bf16<3, 7, 5>();
      }
      if constexpr (Panels == 2) {
        amx_load<4>(b + panel_bytes, kPanel * 4);
        amx_dot_bf16<2, 6, 4>();
        amx_load<5>(b + panel_bytes + kAmxBytes, kPanel * 4);
        amx_dot_bf16<3, 6, 5>();
      }
    }
    ahead.next = next;
    finish<0>(g, row, count, panel, rows);
    finish<1>(g, row, count, panel, rows);
    if constexpr (Heights * Panels == 2) {
      finish<2>(g, row, count, panel, rows);
      finish<3>(g, row, count, panel, rows);
    }
  }

 private:
  static constexpr int64_t row_of(int tile) { return Heights == 2 ? tile / 2 * kAmxRows : 0; }
  static constexpr int64_t column_of(int tile) { return (Panels == 2 ? tile : tile % 2) * kAmxOutputs; }
  static float* partial(const PanelGemm& g, int64_t row, int64_t panel, int tile) {
    return g.partial + (row + row_of(tile)) * g.ld_partial + (panel - g.first_panel) * kPanel + column_of(tile);
  }

  static void start(const PanelGemm& g, int64_t row, int64_t panel) {
    if (g.first_input == 0) {
      amx_zero<0>(), amx_zero<1>();
      if constexpr (Heights * Panels == 2) amx_zero<2>(), amx_zero<3>();
      return;
    }
    const int64_t stride = g.ld_partial * 4;
    amx_load<0>(partial(g, row, panel, 0), stride);
    amx_load<1>(partial(g, row, panel, 1), stride);
    if constexpr (Heights * Panels == 2) {
      amx_load<2>(partial(g, row, panel, 2), stride);
      amx_load<3>(partial(g, row, panel, 3), stride);
    }
  }

  template <int T>
  static void finish(const PanelGemm& g, int64_t row, int64_t count, int64_t panel, int64_t rows) {
    if (g.last_input != g.layout->k_padded) return amx_store<T>(partial(g, row, panel, T), g.ld_partial * 4);
    const int64_t column = panel * kPanel + column_of(T);
    float* out = g.output + (row + row_of(T)) * g.ld_output + column;
    count -= row_of(T);
    if (count >= rows && g.bias == nullptr && !g.accumulate) return amx_store<T>(out, g.ld_output * 4);
    alignas(64) float tile[kAmxRows * kAmxOutputs];
    amx_store<T>(tile, kAmxBytes);
    const F32 bias = g.bias == nullptr ? set1(0.0f) : load(g.bias + column);
    for (int64_t r = 0; r < (count < rows ? count : rows); ++r) {
      F32 value = load(tile + r * kAmxOutputs);
      if (g.bias != nullptr) value = add(value, bias);
      if (g.accumulate) value = add(value, load(out + r * g.ld_output));
      store(out + r * g.ld_output, value);
    }
  }
};

inline void gemm_amx_bf16(const PanelGemm& g) {
  amx_shape(g.group_rows);
  const int64_t passes = (g.m + 2 * kAmxRows - 1) / (2 * kAmxRows);
  const int64_t panel_bytes = g.layout->panel_elements() * 2;
  const auto stream = [&](int64_t panel) {
    return static_cast<const char*>(g.weight) + panel * panel_bytes + g.first_input / kAmxInputs * kWeightStep;
  };
  for (int64_t panel = g.first_panel; panel < g.last_panel;) {
    if (g.m <= kAmxRows) {
      const bool pair = panel + 2 <= g.last_panel;
      Prefetch ahead{stream(panel) + kStreamAhead, kWeightStep};
      if (pair) {
        AmxTile<1, 2>::run(g, 0, g.m, panel, ahead);
      } else {
        AmxTile<1, 1>::run(g, 0, g.m, panel, ahead);
      }
      panel += pair ? 2 : 1;
      continue;
    }
    // One pass over the rows reads the panel from memory as it goes; of more passes, each fetches its share of the
    // next.
    Prefetch ahead{stream(panel) + kStreamAhead, kWeightStep};
    if (passes > 1) {
      const int64_t next = panel + 1 < g.last_panel ? panel + 1 : g.next_panel;
      ahead = {stream(next), next < g.layout->panels() ? (kWeightStep / 64 + passes - 1) / passes * 64 : 0};
    }
    for (int64_t row = 0; row < g.m; row += 2 * kAmxRows) {
      const int64_t count = g.m - row;
      if (count > kAmxRows) {
        AmxTile<2, 1>::run(g, row, count, panel, ahead);
      } else {
        AmxTile<1, 1>::run(g, row, count, panel, ahead);
      }
    }
    ++panel;
  }
}

inline void gemm_amx(const PanelGemm& g) {
  if (g.layout->dtype == DType::kFloat32) {
    gemm_panels<Float32Format>(g);
  } else {
    gemm_amx_bf16(g);
  }
}

}  // namespace fastserve::cpu::FS_ISA
