// Where K and V of a segment lie.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kv_format.h"

namespace fastserve::cpu::FS_ISA {

constexpr int kScoreColumns = 8;  // columns of tokens come in multiples of this
constexpr int kGroup = 16;        // positions that lie together, whatever the block size

template <class Kv>
class KvSegment {
  using Stored = typename Kv::Stored;
  static constexpr int kStep = Kv::kStep;

 public:
  explicit KvSegment(const AttentionTile& tile)
      : t_(tile),
        ld_(tile.head_dim_padded),
        key_rows_((tile.head_dim + kStep - 1) / kStep),
        in_place_(tile.block_size % kGroup == 0) {}

  int64_t scratch() const { return 2 * kSegment + (in_place_ ? 0 : 2 * kSegment * ld_); }  // floats
  void use(float* scratch) {
    key_scales = scratch;
    value_scales = scratch + kSegment;
    packed_ = reinterpret_cast<Stored*>(scratch + 2 * kSegment);
  }

  // Finds the columns of K and the groups of V that hold a segment.
  void locate(int64_t begin, int64_t tokens) {
    if (!in_place_) pack(begin, tokens);
    if constexpr (Kv::kScaled) locate_scales(begin, tokens);
    const int64_t groups = (tokens + kGroup - 1) / kGroup;
    int64_t columns = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const Stored *first_keys, *first_values;
      if (in_place_) {
        const int64_t position = begin + g * kGroup, slot = position % t_.block_size;
        const Stored* block = block_of(position);
        first_keys = block + slot * kStep;
        first_values = block + t_.value_offset + slot * ld_;
      } else {
        first_keys = packed_ + g * kGroup * key_rows_ * kStep;
        first_values = packed_ + kSegment * ld_ + g * kGroup * ld_;
      }
      for (int64_t i = 0; i < kGroup; i += kWidth) keys[columns++] = first_keys + i * kStep;
      values[g] = first_values;
    }
    // Register tiles are whole: what they compute of the last column again is not read.
    for (; columns % kScoreColumns != 0; ++columns) keys[columns] = keys[columns - 1];
    key_stride = (in_place_ ? t_.slots_padded : kGroup) * kStep;
  }

  const Stored* keys[kSegment / kWidth];
  int64_t key_stride = 0;  // elements from one row of K to the next
  const Stored* values[kSegment / kGroup];
  float *key_scales, *value_scales;  // [kSegment], where there are any

 private:
  const Stored* block_of(int64_t position) const {
    return static_cast<const Stored*>(t_.pool) + t_.table[position / t_.block_size] * t_.block_stride;
  }

  // Puts the scales of a segment's tokens in a row.
  void locate_scales(int64_t begin, int64_t tokens) {
    for (int64_t i = 0; i < tokens;) {
      const int64_t slot = (begin + i) % t_.block_size;
      const float* scales = reinterpret_cast<const float*>(block_of(begin + i) + t_.scale_offset) + slot;
      if (in_place_) {
        for (const int64_t end = i + kGroup; i < end; i += kWidth, scales += kWidth) {
          store(key_scales + i, load(scales));
          store(value_scales + i, load(scales + t_.slots_padded));
        }
      } else {
        key_scales[i] = scales[0];
        value_scales[i++] = scales[t_.slots_padded];
      }
    }
  }

  // Groups that blocks of an odd size tear apart are put together first.
  void pack(int64_t begin, int64_t tokens) {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t slot = (begin + i) % t_.block_size, lane = i % kGroup;
      const Stored* from = block_of(begin + i) + slot * kStep;
      Stored* to = packed_ + (i - lane) * key_rows_ * kStep + lane * kStep;
      for (int64_t d = 0; d < key_rows_; ++d) {
        for (int j = 0; j < kStep; ++j) to[d * kGroup * kStep + j] = from[d * t_.slots_padded * kStep + j];
      }
      from = block_of(begin + i) + t_.value_offset + slot / kStep * kStep * ld_ + slot % kStep;
      to = packed_ + kSegment * ld_ + i / kStep * kStep * ld_ + i % kStep;
      for (int64_t d = 0; d < ld_; ++d) to[d * kStep] = from[d * kStep];
    }
  }

  const AttentionTile& t_;
  const int64_t ld_;
  const int64_t key_rows_;
  const bool in_place_;
  Stored* packed_ = nullptr;  // a segment's K, then its V
};

}  // namespace fastserve::cpu::FS_ISA
