// Paged, causal, grouped-query attention of a tile of query vectors over one KV head.
//
// A query's result is built from absolute segments of kSegment positions: inside a segment plain softmax attention,
// segments merged in ascending order. Lanes and sums depend on absolute positions only, so neither the tile, nor the
// chunking, nor the block size changes a bit of it. Decode is a tile of one position.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/simd.h"

namespace fastserve::cpu::FS_ISA {

#if defined(__AVX512F__)
constexpr int kScoreVectors = 8;  // query vectors that share one load of K
constexpr int kValueVectors = 4;  // query vectors that share one load of V
#else
constexpr int kScoreVectors = 4;
constexpr int kValueVectors = 2;
#endif
constexpr int kValueRegisters = 4;  // vectors of V handled together

// Scratch of a tile, by query vector r = query * heads + head.
struct TileScratch {
  float* q;        // [vectors][head_dim_padded], scaled
  float* weights;  // [vectors][kWeightStride]: scores, then e^(score - max)
  float* partial;  // [vectors][head_dim_padded]: the segment's weighted sum of V
  float* total;    // [vectors][head_dim_padded]: merged so far
  float* maximum;  // [vectors]
  float* sum;      // [vectors]
};

constexpr int64_t kWeightStride = kSegment + 16;

// out[v] (lane = token) = q_r · K[token] for kWidth tokens of one block, from K [head_dim][slots_padded].
template <class T, int Vectors>
inline void score_tokens(const float* q, int64_t ld_q, const T* k, int64_t slots_padded, int64_t head_dim, F32* out) {
  F32 acc[Vectors];
  for (int r = 0; r < Vectors; ++r) acc[r] = set1(0.0f);
  for (int64_t d = 0; d < head_dim; ++d) {
    const F32 key = load(k + d * slots_padded);
    for (int r = 0; r < Vectors; ++r) acc[r] = fma(set1(q[r * ld_q + d]), key, acc[r]);
  }
  for (int r = 0; r < Vectors; ++r) out[r] = acc[r];
}

template <class T, int Vectors>
inline void score_dispatch(int64_t vectors, const float* q, int64_t ld_q, const T* k, int64_t slots_padded,
                           int64_t head_dim, F32* out) {
  if constexpr (Vectors > 0) {
    if (vectors == Vectors) {
      score_tokens<T, Vectors>(q, ld_q, k, slots_padded, head_dim, out);
    } else {
      score_dispatch<T, Vectors - 1>(vectors, q, ld_q, k, slots_padded, head_dim, out);
    }
  }
}

// partial[r] += Σ_t weights[r][t] · V[t] for one run of tokens inside a block, ascending; V [tokens][head_dim_padded].
template <class T, int Vectors, int Registers>
inline void weigh_values(const float* weights, const T* v, int64_t tokens, int64_t ld, float* partial) {
  F32 acc[Vectors][Registers];
  for (int r = 0; r < Vectors; ++r) {
    for (int i = 0; i < Registers; ++i) acc[r][i] = load(partial + r * ld + i * kWidth);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    F32 value[Registers];
    for (int i = 0; i < Registers; ++i) value[i] = load(v + t * ld + i * kWidth);
    for (int r = 0; r < Vectors; ++r) {
      const F32 w = set1(weights[r * kWeightStride + t]);
      for (int i = 0; i < Registers; ++i) acc[r][i] = fma(w, value[i], acc[r][i]);
    }
  }
  for (int r = 0; r < Vectors; ++r) {
    for (int i = 0; i < Registers; ++i) store(partial + r * ld + i * kWidth, acc[r][i]);
  }
}

template <class T, int Vectors>
inline void weigh_all(const float* weights, const T* v, int64_t tokens, int64_t ld, float* partial) {
  int64_t d = 0;
  for (; d + kValueRegisters * kWidth <= ld; d += kValueRegisters * kWidth) {
    weigh_values<T, Vectors, kValueRegisters>(weights, v + d, tokens, ld, partial + d);
  }
  for (; d < ld; d += kWidth) weigh_values<T, Vectors, 1>(weights, v + d, tokens, ld, partial + d);
}

template <class T>
class TileAttention {
 public:
  explicit TileAttention(const AttentionTile& tile) : t_(tile), vectors_(tile.queries * tile.heads) {
    const int64_t ld = t_.head_dim_padded;
    s_.q = t_.scratch;
    s_.partial = s_.q + vectors_ * ld;
    s_.total = s_.partial + vectors_ * ld;
    s_.weights = s_.total + vectors_ * ld;
    s_.maximum = s_.weights + vectors_ * kWeightStride;
    s_.sum = s_.maximum + vectors_;
  }

  void run() {
    for (int64_t r = 0; r < vectors_; ++r) {
      const float* q = t_.q + r / t_.heads * t_.ld_q + r % t_.heads * t_.head_dim;
      for (int64_t d = 0; d < t_.head_dim; ++d) s_.q[r * t_.head_dim_padded + d] = q[d] * t_.scale;
    }
    const int64_t context = t_.position + t_.queries;
    for (int64_t begin = 0; begin < context; begin += kSegment) {
      const int64_t end = begin + kSegment < context ? begin + kSegment : context;
      // Queries before the segment see nothing of it.
      const int64_t skipped = begin > t_.position ? (begin - t_.position) * t_.heads : 0;
      score(begin, end, skipped);
      for (int64_t r = skipped; r < vectors_; ++r) soften(r, valid(r, begin));
      weigh(begin, end, skipped);
      for (int64_t r = skipped; r < vectors_; ++r) merge(r, begin == 0);
    }
    for (int64_t r = 0; r < vectors_; ++r) {
      float* out = t_.output + r / t_.heads * t_.ld_output + r % t_.heads * t_.head_dim;
      const float inverse = 1.0f / s_.sum[r];
      for (int64_t d = 0; d < t_.head_dim; ++d) out[d] = s_.total[r * t_.head_dim_padded + d] * inverse;
    }
  }

 private:
  // Positions of the segment that query vector r may see.
  int64_t valid(int64_t r, int64_t begin) const {
    const int64_t seen = t_.position + r / t_.heads + 1 - begin;
    return seen < kSegment ? seen : kSegment;
  }

  const T* keys(int64_t position) const {
    return static_cast<const T*>(t_.pool) + t_.table[position / t_.block_size] * t_.block_stride;
  }
  const T* values(int64_t position) const { return keys(position) + t_.head_dim * t_.slots_padded; }

  // Calls body(position, slot, tokens) for each run of positions that lies in one block.
  template <class Body>
  void for_each_run(int64_t begin, int64_t end, Body body) const {
    while (begin < end) {
      const int64_t slot = begin % t_.block_size;
      const int64_t left = t_.block_size - slot;
      const int64_t tokens = left < end - begin ? left : end - begin;
      body(begin, slot, tokens);
      begin += tokens;
    }
  }

  void score(int64_t begin, int64_t end, int64_t skipped) {
    for_each_run(begin, end, [&](int64_t position, int64_t slot, int64_t tokens) {
      const T* k = keys(position);
      // Whole vectors of slots; those outside the run are computed and dropped.
      for (int64_t first = slot / kWidth * kWidth; first < slot + tokens; first += kWidth) {
        const int64_t from = first < slot ? slot : first;
        const int64_t to = first + kWidth < slot + tokens ? first + kWidth : slot + tokens;
        const int64_t column = position - begin + from - slot;
        for (int64_t r = skipped; r < vectors_; r += kScoreVectors) {
          const int64_t count = vectors_ - r < kScoreVectors ? vectors_ - r : kScoreVectors;
          F32 scores[kScoreVectors];
          score_dispatch<T, kScoreVectors>(count, s_.q + r * t_.head_dim_padded, t_.head_dim_padded, k + first,
                                           t_.slots_padded, t_.head_dim, scores);
          for (int64_t i = 0; i < count; ++i) {
            float* out = s_.weights + (r + i) * kWeightStride + column;
            if (to - from == kWidth) {
              store(out, scores[i]);
            } else {
              alignas(64) float lane[kWidth];
              store(lane, scores[i]);
              for (int64_t j = from; j < to; ++j) out[j - from] = lane[j - first];
            }
          }
        }
      }
    });
  }

  // Scores of the first `count` positions become weights; the rest of the segment weighs nothing.
  void soften(int64_t r, int64_t count) {
    float* w = s_.weights + r * kWeightStride;
    float maximum = w[0];
    for (int64_t i = 1; i < count; ++i) maximum = w[i] > maximum ? w[i] : maximum;
    const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
    for (int64_t i = count; i < padded; ++i) w[i] = maximum;
    for (int64_t i = 0; i < padded; i += kWidth) store(w + i, exp(sub(load(w + i), set1(maximum))));
    for (int64_t i = count; i < padded; ++i) w[i] = 0.0f;
    F32 sum = set1(0.0f);
    for (int64_t i = 0; i < padded; i += kWidth) sum = add(sum, load(w + i));
    segment_max(r) = maximum;
    segment_sum(r) = reduce_add(sum);
  }

  void weigh(int64_t begin, int64_t end, int64_t skipped) {
    const int64_t ld = t_.head_dim_padded;
    for (int64_t r = skipped; r < vectors_; ++r) {
      for (int64_t d = 0; d < ld; ++d) s_.partial[r * ld + d] = 0.0f;
    }
    for_each_run(begin, end, [&](int64_t position, int64_t slot, int64_t tokens) {
      const T* v = values(position) + slot * ld;
      const int64_t column = position - begin;
      for (int64_t r = skipped; r < vectors_;) {
        // A later token's slot may hold anything, so nobody's sum may touch it: the group walks the tokens all of its
        // vectors see, and the rest one vector at a time.
        const int64_t common = clamp(valid(r, begin) - column, tokens);
        const float* w = s_.weights + r * kWeightStride + column;
        float* partial = s_.partial + r * ld;
        if (r + kValueVectors <= vectors_) {
          weigh_all<T, kValueVectors>(w, v, common, ld, partial);
          for (int64_t i = 1; i < kValueVectors; ++i) {
            const int64_t own = clamp(valid(r + i, begin) - column, tokens);
            if (own > common) {
              weigh_all<T, 1>(w + i * kWeightStride + common, v + common * ld, own - common, ld, partial + i * ld);
            }
          }
          r += kValueVectors;
        } else {
          weigh_all<T, 1>(w, v, common, ld, partial);
          ++r;
        }
      }
    });
  }

  // Adds the segment to the running result, rescaling whichever of the two has the smaller maximum.
  void merge(int64_t r, bool first) {
    const int64_t ld = t_.head_dim_padded;
    float* total = s_.total + r * ld;
    const float* partial = s_.partial + r * ld;
    if (first) {
      for (int64_t d = 0; d < ld; d += kWidth) store(total + d, load(partial + d));
      s_.maximum[r] = segment_max(r);
      s_.sum[r] = segment_sum(r);
      return;
    }
    const float maximum = segment_max(r) > s_.maximum[r] ? segment_max(r) : s_.maximum[r];
    const float keep = exp(s_.maximum[r] - maximum), take = exp(segment_max(r) - maximum);
    for (int64_t d = 0; d < ld; d += kWidth) {
      store(total + d, fma(load(partial + d), set1(take), mul(load(total + d), set1(keep))));
    }
    s_.sum[r] = s_.sum[r] * keep + segment_sum(r) * take;
    s_.maximum[r] = maximum;
  }

  static int64_t clamp(int64_t value, int64_t high) { return value < 0 ? 0 : value < high ? value : high; }
  // Kept in the slack behind a vector's weights.
  float& segment_max(int64_t r) { return s_.weights[r * kWeightStride + kSegment]; }
  float& segment_sum(int64_t r) { return s_.weights[r * kWeightStride + kSegment + 1]; }

  const AttentionTile& t_;
  const int64_t vectors_;
  TileScratch s_;
};

template <class T>
inline void attention(const AttentionTile& tile) {
  TileAttention<T>(tile).run();
}

}  // namespace fastserve::cpu::FS_ISA
