// Paged, causal, grouped-query attention of a tile of query vectors over one KV head.
//
// A query's result is built from absolute segments of kSegment positions: inside a segment plain softmax attention,
// segments merged in ascending order. Every sum is one chain over dimensions or over absolute positions, ascending, so
// neither the tile, nor the chunking, nor the block size, nor who computed a segment changes a bit of it. Decode is a
// tile of one position.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kv_format.h"
#include "backend/cpu/kv_int8.h"
#include "backend/cpu/kv_segment.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

// Register tiles: query vectors by columns (of tokens for the scores, of dimensions for the values).
template <class Kv>
struct RegisterTile {
#if defined(__AVX512F__)
  static constexpr int kRows = Kv::kScaled ? 4 : 6;  // a sum may take two registers, and what it meets two
  static constexpr int score_columns(int rows) {
    return Kv::kScaled ? (rows == 1 ? 8 : rows <= 3 ? 4 : 2) : rows <= 3 ? 8 : 4;
  }
  static constexpr int value_columns(int rows) { return Kv::kScaled && rows == 4 ? 2 : 4; }
#else
  static constexpr int kRows = 4;
  static constexpr int score_columns(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
  static constexpr int value_columns(int rows) { return rows <= 2 ? 4 : 2; }
#endif
};
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
  using Sum = typename Kv::Sum;
  using Tile = RegisterTile<Kv>;
  static constexpr int kStep = Kv::kStep;
  static constexpr int kTileRows = Tile::kRows;

 public:
  explicit TileAttention(const AttentionTile& tile) : TileAttention(tile, tile.queries * tile.heads) {}

  // Scratch memory has room for `rows` query vectors, of which there may be fewer.
  TileAttention(const AttentionTile& tile, int64_t rows)
      : t_(tile),
        vectors_(tile.queries * tile.heads),
        ld_(tile.head_dim_padded),
        key_rows_((tile.head_dim + kStep - 1) / kStep),
        segment_(tile) {
    float* free = t_.scratch;
    const auto take = [&](int64_t floats) {
      float* taken = free;
      free += (floats + 15) / 16 * 16;
      return taken;
    };
    q_ = reinterpret_cast<Operand*>(take(rows * ld_));
    scores_ = take(rows * kAttentionStride);
    total_ = take(vectors_ * ld_);
    ragged_ = reinterpret_cast<Sum*>(take(kTileRows * ld_ * (sizeof(Sum) / sizeof(F32))));
    for (float** row : {&segment_max_, &segment_sum_, &max_, &sum_, &keep_, &take_}) *row = take(vectors_ + 16);
    for (Rounded** row : {&query_, &weight_}) *row = reinterpret_cast<Rounded*>(take(2 * vectors_));
    segment_.use(take(segment_.scratch()));
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
      for (int64_t d = (key_rows_ - 1) * kStep; d < key_rows_ * kStep; ++d) q[d] = Operand{};
      if constexpr (Kv::kScaled) {
        for (int64_t d = 0; d < t_.head_dim; ++d) total_[d] = from[d] * scale;
        query_[r] = Kv::round_query(total_, t_.head_dim, q);
      } else {
        for (int64_t d = 0; d < t_.head_dim; ++d) q[d] = Kv::operand(from[d] * scale);
      }
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
    segment_.locate(begin, tokens);
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

  // Scores of query vectors [r, r + Rows) and columns [first, end) of tokens.
  template <int Rows>
  void score(int64_t r, int64_t first, int64_t end) {
    constexpr int kColumns = Tile::score_columns(Rows);
    int64_t c = first;
    for (; c + kColumns / 2 < end; c += kColumns) score_columns_at<Rows, kColumns>(r, c);
    if (c < end) score_columns_at<Rows, kColumns / 2>(r, c);
  }

  template <int Rows, int Columns>
  void score_columns_at(int64_t r, int64_t c) {
    const Operand* q = q_ + r * ld_;
    const Stored* keys[Columns];
    Sum acc[Rows][Columns];
    for (int j = 0; j < Columns; ++j) keys[j] = segment_.keys[c + j];
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) acc[i][j] = Kv::start(query_[r + i]);
    }
    for (int64_t d = 0; d < key_rows_; ++d) {
      typename Kv::Loaded key[Columns];
      for (int j = 0; j < Columns; ++j) key[j] = Kv::load_rows(keys[j] + d * segment_.key_stride);
      for (int i = 0; i < Rows; ++i) {
        for (int j = 0; j < Columns; ++j) Kv::step(acc[i][j], q + i * ld_ + d * kStep, key[j]);
      }
    }
    // Sums stay in registers only if GCC unrolls all loops over them, which it does by itself to short ones.
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      float* out = scores_ + (r + i) * kAttentionStride + c * kWidth;
#pragma GCC unroll 8
      for (int j = 0; j < Columns; ++j) {
        F32 score = Kv::finish(acc[i][j], query_[r + i]);
        if constexpr (Kv::kScaled) score = mul(score, load(segment_.key_scales + (c + j) * kWidth));
        store(out + j * kWidth, score);
      }
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
    F32 sum = set1(0.0f), scaled = sum, odd = sum;
    Operand* w = weights(r);
    for (int64_t i = 0; i < padded; i += 2 * kWidth) {
      const F32 first = exp2_negative<Kv::kExpDegree>(sub(load(s + i), reference));
      const F32 second = exp2_negative<Kv::kExpDegree>(sub(load(s + i + kWidth), reference));
      if constexpr (Kv::kScaled) {
        sum = add(add(sum, first), second);
        // The scales of those that are not seen may be anything.
        const float* scales = segment_.value_scales + i;
        float seen[2 * kWidth];
        if (i + 2 * kWidth > count) {
          for (int64_t j = 0; j < 2 * kWidth; ++j) seen[j] = i + j < count ? scales[j] : 0.0f;
          scales = seen;
        }
        for (int j = 0; j < 2; ++j) {
          const F32 x = mul(j == 0 ? first : second, load(scales + j * kWidth));
          scaled = max(scaled, x);
          odd = fma(x, set1(0.0f), odd);  // a maximum may lose a NaN
          store(s + i + j * kWidth, x);
        }
      } else {
        sum = Kv::put(w + i, first, second, sum);
      }
    }
    segment_max_[r] = largest;
    segment_sum_[r] = reduce_add(sum);
    if constexpr (Kv::kScaled) {
      weight_[r] = Kv::round_weights(s, padded, reduce_max(scaled) + reduce_add(odd), w);
    }
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
        constexpr int kRows = rows.value, kColumns = Tile::value_columns(kRows);
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
    Sum acc[Rows][Columns];
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) acc[i][j] = Kv::start(weight_[r + i]);
    }
    // A later token's slot may hold anything, so nobody's sum may touch it: together the vectors walk the tokens that
    // the first one sees.
    const int64_t common = seen(r, begin) / kStep * kStep;
    const Operand* w = weights(r);
    constexpr int64_t kLd = kAttentionStride * (sizeof(float) / sizeof(Operand));
    for (int64_t t = 0; t < common; t += kGroup) {
      const Stored* v = segment_.values[t / kGroup] + d * kStep;
      const int64_t steps = (common - t < kGroup ? common - t : kGroup) / kStep;
      for (int64_t s = 0; s < steps; ++s, v += ld_ * kStep, w += kStep) {
        typename Kv::Loaded value[Columns];
        for (int j = 0; j < Columns; ++j) value[j] = Kv::load_rows(v + j * kWidth * kStep);
        for (int i = 0; i < Rows; ++i) {
          for (int j = 0; j < Columns; ++j) Kv::step(acc[i][j], w + i * kLd, value[j]);
        }
      }
    }
    if (seen(r + Rows - 1, begin) != common) {
      for (int i = 0; i < Rows; ++i) {
        Sum* row = ragged_ + i * Columns;
        for (int j = 0; j < Columns; ++j) row[j] = acc[i][j];
        weigh_rest<Columns>(weights(r + i), common, seen(r + i, begin), d, row);
        for (int j = 0; j < Columns; ++j) acc[i][j] = row[j];
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) {
        fold(out + (r + i) * ld_ + d + j * kWidth, Kv::finish(acc[i][j], weight_[r + i]), r + i, onto);
      }
    }
  }

  // Continues one vector's sum with tokens [from, to).
  template <int Columns>
  void weigh_rest(const Operand* w, int64_t from, int64_t to, int64_t d, Sum* sum) const {
    for (int64_t t = from; t < to; t += kStep) {
      const Stored* v = segment_.values[t / kGroup] + t % kGroup * ld_ + d * kStep;
      for (int j = 0; j < Columns; ++j) {
        const Stored* p = v + j * kWidth * kStep;
        const auto value = t + kStep <= to ? Kv::load_rows(p) : Kv::load_first_row(p);
        Kv::step(sum[j], w + t, value);
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
  KvSegment<Kv> segment_;
  Operand* q_;     // [vectors][ld], scaled
  float* scores_;  // [vectors][kAttentionStride]; later the weights, as Operand
  float* total_;   // [vectors][ld]: merged so far
  Sum* ragged_;    // [kTileRows][ld]
  float *segment_max_, *segment_sum_, *max_, *sum_, *keep_, *take_;  // [vectors]
  Rounded *query_, *weight_;                                         // [vectors]
  float* free_;                                                      // scratch memory that is left
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
