// How a product is cut into tasks and, where kernels are fast enough to wait for memory, into parts of its sums that
// leave the operand in the L2 cache. Nothing here changes a bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/kernels.h"

namespace fastserve::cpu {

struct GemmBlocks {
  int64_t rows, row_blocks;
  int64_t pieces;  // of the panels; piece i is [i · panels / pieces, (i + 1) · panels / pieces)
  int64_t inputs;  // of a part of the sums
};

// Rows of a block whose sums are cut: every weight is read from memory once for so many.
constexpr int64_t kBlockRows = 256;

// Pieces of at least `together` panels that leave no thread with more than another; about eight a thread, to level what
// else the threads have to do.
inline int64_t panel_pieces(int64_t panels, int64_t together, int64_t row_blocks, int threads) {
  const int64_t rounds = std::clamp<int64_t>(panels / together * row_blocks / threads, 1, 8);
  return std::min(panels, ceil_div(rounds * threads, row_blocks));
}

inline GemmBlocks cut_gemm(const PanelLayout& layout, int64_t m, int64_t element_bytes, const KernelTable& kernels,
                           int threads) {
  const int64_t cached_bytes = layout.dtype == DType::kBFloat16 ? kernels.cached_bytes : 0;
  const int64_t k = layout.k_padded;
  GemmBlocks blocks{.rows = m, .row_blocks = 1, .pieces = 0, .inputs = k};
  if (cached_bytes != 0 && m * k * element_bytes > cached_bytes) {
    const int64_t cached = cached_bytes / element_bytes, whole = cached / k;  // rows that fit with all their inputs
    const int64_t most = std::max(whole, std::min(m, kBlockRows));
    if (most > whole) blocks.inputs = round_up(ceil_div(k, ceil_div(most * k, cached)), 32);
    blocks.rows = round_up(ceil_div(m, ceil_div(m, most)), 32);  // two tiles of AMX
    blocks.row_blocks = ceil_div(m, blocks.rows);
  }
  blocks.pieces = panel_pieces(layout.panels(), m > kernels.paired_rows ? 1 : 2, blocks.row_blocks, threads);
  return blocks;
}

}  // namespace fastserve::cpu
