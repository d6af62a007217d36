// Paged, causal, grouped-query attention of a tile of query vectors over one KV head.
//
// A query's result is built from absolute segments of kSegment positions: inside a segment plain softmax attention,
// segments merged in ascending order. Every sum is one chain over dimensions or over absolute positions, ascending, so
// neither the tile, nor the chunking, nor the block size, nor who computed a segment changes a bit of it. Decode is a
// tile of one position.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kv_format.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

// Register tiles: query vectors by columns (of tokens for the scores, of dimensions for the values).
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int score_columns(int rows) { return rows <= 3 ? 8 : 4; }
constexpr int value_columns(int) { return 4; }
#else
constexpr int kTileRows = 4;
constexpr int score_columns(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
constexpr int value_columns(int rows) { return rows <= 2 ? 4 : 2; }
#endif
constexpr int kScoreColumns = 8;       // a multiple of every score_columns()
constexpr int kGroup = 16;             // positions that lie together, whatever the block size
constexpr float kLog2E = 1.44269504f;  // weights are powers of two
constexpr float kLowest = -3e38f;      // score of a position that is not seen

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(Count<rows>) for 1 <= rows <= N.
template <int N, class Body>
inline void with_count(int64_t rows, Body body) {
  if constexpr (N == 1) {
    body(Count<1>());
  } else if (rows >= N) {
    body(Count<N>());
  } else {
    with_count<N - 1>(rows, body);
  }
}

template <class Kv>
class TileAttention {
  using Stored = typename Kv::Stored;
  using Operand = typename Kv::Operand;
  static constexpr int kStep = Kv::kStep;

 public:
  explicit TileAttention(const AttentionTile& tile) : TileAttention(tile, tile.queries * tile.heads) {}

  // Scratch memory has room for `rows` query vectors, of which there may be fewer.
  TileAttention(const AttentionTile& tile, int64_t rows)
      : t_(tile),
        vectors_(tile.queries * tile.heads),
        ld_(tile.head_dim_padded),
        key_rows_((tile.head_dim + kStep - 1) / kStep),
        in_place_(tile.block_size % kGroup == 0) {
    float* free = t_.scratch;
    const auto take = [&](int64_t floats) {
      float* taken = free;
      free += (floats + 15) / 16 * 16;
      return taken;
    };
    q_ = reinterpret_cast<Operand*>(take(rows * ld_));
    scores_ = take(rows * kAttentionStride);
    total_ = take(vectors_ * ld_);
    ragged_ = take(kTileRows * ld_);
    for (float** row : {&segment_max_, &segment_sum_, &max_, &sum_, &keep_, &take_}) *row = take(vectors_ + 16);
    packed_ = reinterpret_cast<Stored*>(take(in_place_ ? 0 : 2 * kSegment * ld_));
    free_ = free;
    load_queries();
  }

  void run() {
    const int64_t context = t_.position + t_.queries;
    for (int64_t begin = 0; begin < context; begin += kSegment) {
      const int64_t skipped = attend(begin);
      fold_factors(skipped, begin == 0);
      weigh(begin, skipped, total_, begin != 0);
    }
    finish();
  }

  void run_segment(int64_t segment, float* partial) {
    const int64_t begin = segment * kSegment, skipped = attend(begin);
    weigh(begin, skipped, partial, false);
    float* stats = partial + vectors_ * ld_;
    for (int64_t r = skipped; r < vectors_; ++r) {
      stats[r] = segment_max_[r];
      stats[vectors_ + r] = segment_sum_[r];
    }
  }

  void merge(const float* partials) {
    const int64_t context = t_.position + t_.queries;
    for (int64_t begin = 0; begin < context; begin += kSegment, partials += attention_partial(vectors_, ld_)) {
      const int64_t skipped = unseeing(begin);
      const float* stats = partials + vectors_ * ld_;
      for (int64_t r = skipped; r < vectors_; ++r) {
        segment_max_[r] = stats[r];
        segment_sum_[r] = stats[vectors_ + r];
      }
      fold_factors(skipped, begin == 0);
      for (int64_t r = skipped; r < vectors_; ++r) {
        for (int64_t d = 0; d < ld_; d += kWidth) {
          fold(total_ + r * ld_ + d, load(partials + r * ld_ + d), r, begin != 0);
        }
      }
    }
    finish();
  }

 protected:
  void load_queries() {
    const float scale = t_.scale * kLog2E;
    for (int64_t r = 0; r < vectors_; ++r) {
      const float* from = t_.q + r / t_.heads * t_.ld_q + r % t_.heads * t_.head_dim;
      Operand* q = q_ + r * ld_;
      for (int64_t d = 0; d < t_.head_dim; ++d) q[d] = Kv::operand(from[d] * scale);
      for (int64_t d = t_.head_dim; d < key_rows_ * kStep; ++d) q[d] = Operand{};
    }
  }

  // The first query vectors of the tile, those before the segment, see nothing of it.
  int64_t unseeing(int64_t begin) const { return begin > t_.position ? (begin - t_.position) * t_.heads : 0; }
  // Positions of the segment that query vector r sees.
  int64_t seen(int64_t r, int64_t begin) const {
    const int64_t count = t_.position + r / t_.heads + 1 - begin;
    return count < kSegment ? count : kSegment;
  }
  Operand* weights(int64_t r) const { return reinterpret_cast<Operand*>(scores_ + r * kAttentionStride); }

  // Scores and weights of a segment.
  int64_t attend(int64_t begin) {
    const int64_t skipped = unseeing(begin), tokens = seen(vectors_ - 1, begin);
    locate(begin, tokens);
    const int64_t columns = (tokens + kWidth - 1) / kWidth;
    score_all(skipped, columns);
    for (int64_t r = skipped; r < vectors_; ++r) soften(r, seen(r, begin));
    return skipped;
  }

  virtual void score_all(int64_t skipped, int64_t columns) {
    // Query vectors take turns with as many columns as one register tile of them has: those stay in the L1 cache.
    const int64_t chunk = kScoreColumns;
    for (int64_t c = 0; c < columns; c += chunk) {
      const int64_t end = c + chunk < columns ? c + chunk : columns;
      for (int64_t r = skipped; r < vectors_; r += kTileRows) {
        with_count<kTileRows>(vectors_ - r, [&](auto rows) { score<rows.value>(r, c, end); });
      }
    }
  }

  // Finds the columns of K and the groups of V that hold a segment.
  void locate(int64_t begin, int64_t tokens) {
    if (!in_place_) pack(begin, tokens);
    const int64_t groups = (tokens + kGroup - 1) / kGroup;
    int64_t columns = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const Stored *keys, *values;
      if (in_place_) {
        const int64_t position = begin + g * kGroup, slot = position % t_.block_size;
        const Stored* block = block_of(position);
        keys = block + slot * kStep;
        values = block + t_.value_offset + slot * ld_;
      } else {
        keys = packed_ + g * kGroup * key_rows_ * kStep;
        values = packed_ + kSegment * ld_ + g * kGroup * ld_;
      }
      for (int64_t i = 0; i < kGroup; i += kWidth) keys_[columns++] = keys + i * kStep;
      values_[g] = values;
    }
    // Register tiles are whole: what they compute of the last column again is not read.
    for (; columns % kScoreColumns != 0; ++columns) keys_[columns] = keys_[columns - 1];
    key_stride_ = (in_place_ ? t_.slots_padded : kGroup) * kStep;
  }

  const Stored* block_of(int64_t position) const {
    return static_cast<const Stored*>(t_.pool) + t_.table[position / t_.block_size] * t_.block_stride;
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

  // Scores of query vectors [r, r + Rows) and columns [first, end) of tokens.
  template <int Rows>
  void score(int64_t r, int64_t first, int64_t end) {
    constexpr int kColumns = score_columns(Rows);
    int64_t c = first;
    for (; c + kColumns / 2 < end; c += kColumns) score_columns_at<Rows, kColumns>(r, c);
    if (c < end) score_columns_at<Rows, kColumns / 2>(r, c);
  }

  template <int Rows, int Columns>
  void score_columns_at(int64_t r, int64_t c) {
    const Operand* q = q_ + r * ld_;
    const Stored* keys[Columns];
    F32 acc[Rows][Columns];
    for (int j = 0; j < Columns; ++j) keys[j] = keys_[c + j];
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) acc[i][j] = set1(0.0f);
    }
    for (int64_t d = 0; d < key_rows_; ++d) {
      typename Kv::Loaded key[Columns];
      for (int j = 0; j < Columns; ++j) key[j] = Kv::load_rows(keys[j] + d * key_stride_);
      for (int i = 0; i < Rows; ++i) {
        for (int j = 0; j < Columns; ++j) acc[i][j] = Kv::step(acc[i][j], q + i * ld_ + d * kStep, key[j]);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      float* out = scores_ + (r + i) * kAttentionStride + c * kWidth;
      for (int j = 0; j < Columns; ++j) store(out + j * kWidth, acc[i][j]);
    }
  }

  // Turns the scores of the first `count` positions into weights, in place.
  void soften(int64_t r, int64_t count) {
    float* s = scores_ + r * kAttentionStride;
    const int64_t padded = (count + 2 * kWidth - 1) / (2 * kWidth) * (2 * kWidth);
    for (int64_t i = count; i < padded; ++i) s[i] = kLowest;
    F32 best = load(s), best2 = load(s + kWidth);
    for (int64_t i = 2 * kWidth; i < padded; i += 2 * kWidth) {
      best = max(best, load(s + i));
      best2 = max(best2, load(s + i + kWidth));
    }
    const float largest = reduce_max(max(best, best2));
    const F32 reference = set1(largest);
    // What is not seen weighs 2^-126: nothing beside the largest weight, 1, and it meets no V.
    F32 sum = set1(0.0f);
    Operand* w = weights(r);
    for (int64_t i = 0; i < padded; i += 2 * kWidth) {
      const F32 first = exp2_negative<Kv::kExpDegree>(sub(load(s + i), reference));
      const F32 second = exp2_negative<Kv::kExpDegree>(sub(load(s + i + kWidth), reference));
      sum = Kv::put(w + i, first, second, sum);
    }
    segment_max_[r] = largest;
    segment_sum_[r] = reduce_add(sum);
  }

  // How a segment joins what was merged before: whichever of the two has the smaller maximum is scaled down.
  void fold_factors(int64_t first_vector, bool first) {
    for (int64_t r = first_vector; r < vectors_; r += kWidth) {
      const F32 here = load(segment_max_ + r), sum = load(segment_sum_ + r);
      if (first) {
        store(max_ + r, here);
        store(sum_ + r, sum);
        continue;
      }
      const F32 before = load(max_ + r), largest = max(before, here);
      const F32 keep = exp2_negative<6>(sub(before, largest)), take = exp2_negative<6>(sub(here, largest));
      store(sum_ + r, fma(sum, take, mul(load(sum_ + r), keep)));
      store(max_ + r, largest);
      store(keep_ + r, keep);
      store(take_ + r, take);
    }
  }

  void fold(float* total, F32 part, int64_t r, bool onto) const {
    store(total, onto ? fma(part, set1(take_[r]), mul(load(total), set1(keep_[r]))) : part);
  }

  // Σ weight · V of the segment for every query vector, into `out` or folded onto it.
  virtual void weigh(int64_t begin, int64_t skipped, float* out, bool onto) {
    for (int64_t r = skipped; r < vectors_; r += kTileRows) {
      with_count<kTileRows>(vectors_ - r, [&](auto rows) {
        constexpr int kRows = rows.value, kColumns = value_columns(kRows);
        int64_t d = 0;
        for (; d + kColumns * kWidth <= ld_; d += kColumns * kWidth) {
          weigh_columns<kRows, kColumns>(r, begin, d, out, onto);
        }
        for (; d < ld_; d += kWidth) weigh_columns<kRows, 1>(r, begin, d, out, onto);
      });
    }
  }

  template <int Rows, int Columns>
  void weigh_columns(int64_t r, int64_t begin, int64_t d, float* out, bool onto) {
    F32 acc[Rows][Columns];
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) acc[i][j] = set1(0.0f);
    }
    // A later token's slot may hold anything, so nobody's sum may touch it: together the vectors walk the tokens that
    // the first one sees.
    const int64_t common = seen(r, begin) / kStep * kStep;
    const Operand* w = weights(r);
    constexpr int64_t kLd = kAttentionStride * (sizeof(float) / sizeof(Operand));
    for (int64_t t = 0; t < common; t += kGroup) {
      const Stored* v = values_[t / kGroup] + d * kStep;
      const int64_t steps = (common - t < kGroup ? common - t : kGroup) / kStep;
      for (int64_t s = 0; s < steps; ++s, v += ld_ * kStep, w += kStep) {
        typename Kv::Loaded value[Columns];
        for (int j = 0; j < Columns; ++j) value[j] = Kv::load_rows(v + j * kWidth * kStep);
        for (int i = 0; i < Rows; ++i) {
          for (int j = 0; j < Columns; ++j) acc[i][j] = Kv::step(acc[i][j], w + i * kLd, value[j]);
        }
      }
    }
    if (seen(r + Rows - 1, begin) != common) {
      for (int i = 0; i < Rows; ++i) {
        float* row = ragged_ + i * Columns * kWidth;
        for (int j = 0; j < Columns; ++j) store(row + j * kWidth, acc[i][j]);
        weigh_rest<Columns>(weights(r + i), common, seen(r + i, begin), d, row);
        for (int j = 0; j < Columns; ++j) acc[i][j] = load(row + j * kWidth);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) fold(out + (r + i) * ld_ + d + j * kWidth, acc[i][j], r + i, onto);
    }
  }

  // Continues one vector's sum with tokens [from, to).
  template <int Columns>
  void weigh_rest(const Operand* w, int64_t from, int64_t to, int64_t d, float* sum) const {
    for (int64_t t = from; t < to; t += kStep) {
      const Stored* v = values_[t / kGroup] + t % kGroup * ld_ + d * kStep;
      for (int j = 0; j < Columns; ++j) {
        const Stored* p = v + j * kWidth * kStep;
        const auto value = t + kStep <= to ? Kv::load_rows(p) : Kv::load_first_row(p);
        store(sum + j * kWidth, Kv::step(load(sum + j * kWidth), w + t, value));
      }
    }
  }

  void finish() {
    for (int64_t r = 0; r < vectors_; ++r) {
      float* out = t_.output + r / t_.heads * t_.ld_output + r % t_.heads * t_.head_dim;
      const float inverse = 1.0f / sum_[r];
      for (int64_t d = 0; d < t_.head_dim; ++d) out[d] = total_[r * ld_ + d] * inverse;
    }
  }

  const AttentionTile& t_;
  const int64_t vectors_;  // r = query * heads + head
  const int64_t ld_;
  const int64_t key_rows_;
  const bool in_place_;
  Operand* q_;     // [vectors][ld], scaled
  float* scores_;  // [vectors][kAttentionStride]; later the weights, as Operand
  float* total_;   // [vectors][ld]: merged so far
  float* ragged_;  // [kTileRows][ld]
  float *segment_max_, *segment_sum_, *max_, *sum_, *keep_, *take_;  // [vectors]
  Stored* packed_;                                                   // a segment's K, then its V
  float* free_;                                                      // scratch memory that is left
  int64_t key_stride_ = 0;
  const Stored* keys_[kSegment / kWidth];
  const Stored* values_[kSegment / kGroup];
};

template <class Kv>
inline void attention(const AttentionTile& tile) {
  TileAttention<Kv>(tile).run();
}

template <class Kv>
inline void attention_segment(const AttentionTile& tile, int64_t segment, float* partial) {
  TileAttention<Kv>(tile).run_segment(segment, partial);
}

template <class Kv>
inline void attention_merge(const AttentionTile& tile, const float* partials) {
  TileAttention<Kv>(tile).merge(partials);
}

template <class Kv>
constexpr AttentionKernels attention_kernels() {
  return {attention<Kv>, attention_segment<Kv>, attention_merge<Kv>};
}

}  // namespace fastserve::cpu::FS_ISA
