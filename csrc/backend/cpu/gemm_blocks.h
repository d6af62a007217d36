// How a product is cut into tasks and, where kernels are fast enough to wait for memory, into parts of its sums that
// leave the operand in the L2 cache. Nothing here changes a bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/kernels.h"

namespace fastserve::cpu {

struct GemmBlocks {
  int64_t rows, row_blocks;
  int64_t panels, panel_blocks;
  int64_t inputs;  // of a part of the sums
};

// Rows of a block whose sums are cut: every weight is read from memory once for so many.
constexpr int64_t kBlockRows = 256;

// Even numbers of panels, because kernels like to work on pairs; about eight tasks a thread to level the load.
inline int64_t panels_of_task(int64_t panels, int64_t row_blocks, int threads) {
  return std::max<int64_t>(2, round_up(panels * row_blocks / (8 * threads), 2));
}

// cached_bytes: KernelTable's, or 0.
inline GemmBlocks cut_gemm(const PanelLayout& layout, int64_t m, int64_t element_bytes, int64_t cached_bytes,
                           int threads) {
  const int64_t k = layout.k_padded;
  GemmBlocks blocks{.rows = m, .row_blocks = 1, .panels = 0, .panel_blocks = 0, .inputs = k};
  if (cached_bytes != 0 && m * k * element_bytes > cached_bytes) {
    const int64_t cached = cached_bytes / element_bytes, whole = cached / k;  // rows that fit with all their inputs
    const int64_t most = std::max(whole, std::min(m, kBlockRows));
    if (most > whole) blocks.inputs = round_up(ceil_div(k, ceil_div(most * k, cached)), 32);
    blocks.rows = round_up(ceil_div(m, ceil_div(m, most)), 32);  // two tiles of AMX
    blocks.row_blocks = ceil_div(m, blocks.rows);
  }
  blocks.panels = panels_of_task(layout.panels(), blocks.row_blocks, threads);
  blocks.panel_blocks = ceil_div(layout.panels(), blocks.panels);
  return blocks;
}

}  // namespace fastserve::cpu
