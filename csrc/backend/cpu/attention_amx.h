// Attention over a bfloat16 KV cache on the tiles of AMX. K and V lie in pairs, as B tiles want them: 16 tokens of K
// are 16 columns of a tile, whatever the block size, and 16 tokens of V are half its rows. So the scores are added up
// by 32 dimensions at a time and the values by 16 tokens, from absolute positions on.
#pragma once

#include "backend/cpu/amx.h"
#include "backend/cpu/attention.h"

namespace fastserve::cpu::FS_ISA {

class AmxAttention final : public TileAttention<BFloat16Kv> {
  using Base = TileAttention<BFloat16Kv>;

 public:
  explicit AmxAttention(const AttentionTile& tile) : Base(tile, rows_for(tile.queries * tile.heads)) {
    clean_ = reinterpret_cast<Bf16*>(free_);
  }
  static bool fits(const AttentionTile& tile) { return tile.head_dim % kAmxInputs == 0; }

 private:
  static constexpr int64_t kCleanGroups = 4;  // 32 positions and what is left of the groups at either end

  // Tiles of fewer rows save time only where there is one.
  static int64_t rows_for(int64_t vectors) {
    return vectors < kAmxRows ? vectors : (vectors + kAmxRows - 1) / kAmxRows * kAmxRows;
  }
  int64_t tile_rows() const { return vectors_ < kAmxRows ? vectors_ : kAmxRows; }

  void score_all(int64_t skipped, int64_t columns) override {
    amx_shape(tile_rows());
    for (int64_t r = skipped / kAmxRows * kAmxRows; r < vectors_;) {
      const bool two = r + kAmxRows < vectors_;
      if (two) {
        for (int64_t c = 0; c < columns; c += 2) score_tiles<2, 2>(r, c);
      } else {
        for (int64_t c = 0; c < columns; c += 4) score_tiles<1, 4>(r, c);
      }
      r += two ? 2 * kAmxRows : kAmxRows;
    }
  }

  // Heights · Columns C tiles: two by two, or four beside each other.
  template <int Heights, int Columns>
  void score_tiles(int64_t r, int64_t c) {
    const Bf16* q = q_ + r * ld_;
    const int64_t stride = segment_.key_stride * 2;
    amx_zero<0>(), amx_zero<1>(), amx_zero<2>(), amx_zero<3>();
    for (int64_t d = 0; d < t_.head_dim; d += kAmxInputs) {
      const int64_t row = d / 2 * segment_.key_stride;
      amx_load<6>(q + d, ld_ * 2);
      if constexpr (Heights == 2) amx_load<7>(q + d + kAmxRows * ld_, ld_ * 2);
      multiply_step<Heights>([&](auto j) __attribute__((always_inline)) { return segment_.keys[c + j.value] + row; },
                             stride);
    }
    float* out = scores_ + r * kAttentionStride + c * kAmxOutputs;
    float* below = Heights == 2 ? out + kAmxRows * kAttentionStride : out + 2 * kAmxOutputs;
    amx_store<0>(out, kAttentionStride * 4);
    amx_store<1>(out + kAmxOutputs, kAttentionStride * 4);
    amx_store<2>(below, kAttentionStride * 4);
    amx_store<3>(below + kAmxOutputs, kAttentionStride * 4);
  }

  // One step of four tiles; b(Count<j>) is the j-th B tile. Those of A are loaded.
  template <int Heights, class B>
  [[gnu::always_inline]] static void multiply_step(B b, int64_t stride) {
    amx_load<4>(b(Count<0>()), stride);
    amx_dot_bf16<0, 6, 4>();
    amx_load<5>(b(Count<1>()), stride);
    amx_dot_bf16<1, 6, 5>();
    if constexpr (Heights == 2) {
      amx_dot_bf16<2, 7, 4>();
      amx_dot_bf16<3, 7, 5>();
    } else {
      amx_load<4>(b(Count<2>()), stride);
      amx_dot_bf16<2, 6, 4>();
      amx_load<5>(b(Count<3>()), stride);
      amx_dot_bf16<3, 6, 5>();
    }
  }

  void weigh(int64_t begin, int64_t skipped, float* out, bool onto) override {
    amx_shape(tile_rows(), kGroup);
    for (int64_t r = skipped; r < vectors_;) {
      const int64_t tile = r / kAmxRows * kAmxRows;
      const bool two = tile + kAmxRows < vectors_;
      const int64_t most = tile + (two ? 2 : 1) * kAmxRows, end = most < vectors_ ? most : vectors_;
      if (two) {
        weigh_rows<2>(begin, tile, r, end, out, onto);
      } else {
        weigh_rows<1>(begin, tile, r, end, out, onto);
      }
      r = end;
    }
  }

  // Vectors [r, end) of the tiles that begin with vector `tile`.
  template <int Heights>
  void weigh_rows(int64_t begin, int64_t tile, int64_t r, int64_t end, float* out, bool onto) {
    const int64_t common = seen(r, begin) / kGroup, last = seen(end - 1, begin), groups = (last + kGroup - 1) / kGroup;
    const Bf16* values[kSegment / kGroup];
    for (int64_t g = 0; g < common; ++g) values[g] = segment_.values[g];
    // A token that a vector does not see weighs nothing with it; but nothing times what is no number is not nothing.
    // Slots that nobody sees may hold anything. Where a token is no number, the vectors go one by one.
    bool finite = true;
    for (int64_t g = common; g < groups; ++g) {
      Bf16* clean = clean_ + (g - common) * kGroup * ld_;
      finite = copy_values(segment_.values[g], last - g * kGroup, clean) && finite;
      values[g] = clean;
    }
    if (!finite && end - r > 1) {
      for (int64_t i = r; i < end; ++i) weigh_rows<Heights>(begin, tile, i, i + 1, out, onto);
      return;
    }
    for (int64_t i = r; i < end; ++i) {
      Bf16* w = weights(i);
      for (int64_t t = seen(i, begin); t < groups * kGroup; ++t) w[t] = Bf16{};
    }
    constexpr int64_t kColumns = (Heights == 2 ? 2 : 4) * kAmxOutputs;
    for (int64_t d = 0; d < ld_; d += kColumns) weigh_tiles<Heights>(values, groups, tile, r, end, d, out, onto);
  }

  template <int Heights>
  void weigh_tiles(const Bf16* const* values, int64_t groups, int64_t tile, int64_t r, int64_t end, int64_t d,
                   float* out, bool onto) {
    constexpr int64_t kLd = kAttentionStride * 2;
    const Bf16* w = weights(tile);
    amx_zero<0>(), amx_zero<1>(), amx_zero<2>(), amx_zero<3>();
    // The last of four columns of tiles may be beyond the last dimension: then others are computed again.
    const int64_t third = Heights == 2 || d + 2 * kAmxOutputs < ld_ ? 2 * kAmxOutputs : 0;
    for (int64_t g = 0; g < groups; ++g, w += kGroup) {
      amx_load<6>(w, kLd * 2);
      if constexpr (Heights == 2) amx_load<7>(w + kAmxRows * kLd, kLd * 2);
      const auto column = [&](auto j) __attribute__((always_inline)) {
        return values[g] + (d + (j.value >= 2 ? third : 0) + j.value % 2 * kAmxOutputs) * 2;
      };
      multiply_step<Heights>(column, ld_ * 4);
    }
    alignas(64) float sums[kAmxRows * kAmxOutputs];
    const auto take = [&](int64_t row, int64_t column) {
      for (int64_t i = row < r ? r : row; i < (row + kAmxRows < end ? row + kAmxRows : end); ++i) {
        fold(out + i * ld_ + column, load(sums + (i - row) * kAmxOutputs), i, onto);
      }
    };
    amx_store<0>(sums, kAmxBytes), take(tile, d);
    amx_store<1>(sums, kAmxBytes), take(tile, d + kAmxOutputs);
    if (Heights == 1 && third == 0) return;
    const int64_t row = tile + (Heights == 2 ? kAmxRows : 0), column = d + (Heights == 2 ? 0 : 2 * kAmxOutputs);
    amx_store<2>(sums, kAmxBytes), take(row, column);
    amx_store<3>(sums, kAmxBytes), take(row, column + kAmxOutputs);
  }

  // Copies the first `tokens` of a group's V, zeros for the others; whether all of it are numbers.
  bool copy_values(const Bf16* from, int64_t tokens, Bf16* to) const {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    uint32_t bad = 0;
    for (int64_t t = 0; t < kGroup; t += 2) {
      const int64_t there = tokens - t;
      const __m512i mask = _mm512_set1_epi32(there >= 2 ? -1 : there == 1 ? 0xffff : 0);
      for (int64_t d = 0; d < ld_; d += kAmxOutputs) {
        const int64_t at = (t / 2 * ld_ + d) * 2;
        const __m512i pairs = _mm512_and_si512(_mm512_loadu_si512(from + at), mask);
        bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
        _mm512_storeu_si512(to + at, pairs);
      }
    }
    return bad == 0;
  }

  Bf16* clean_;  // [kCleanGroups][group][ld]
};

inline void attention_amx(const AttentionTile& tile) {
  AmxAttention::fits(tile) ? AmxAttention(tile).run() : attention<BFloat16Kv>(tile);
}

inline void attention_amx_segment(const AttentionTile& tile, int64_t segment, float* partial) {
  AmxAttention::fits(tile) ? AmxAttention(tile).run_segment(segment, partial)
                           : attention_segment<BFloat16Kv>(tile, segment, partial);
}

inline void attention_amx_merge(const AttentionTile& tile, const float* partials) {
  attention_merge<BFloat16Kv>(tile, partials);  // no products
}

}  // namespace fastserve::cpu::FS_ISA
