// The arithmetic of paged attention in 16 bits, written once for prefill and decode, so that a token's output has the
// same bits whichever of them computes it, and in whatever batch.
//
// A warp has 16 query vectors. Their context is cut at absolute multiples of kSegment positions, and a segment into
// tiles of kKeyTile. Tiles are taken in ascending order by a softmax that keeps a running maximum; segments begin anew
// and merge in ascending order. All sums are chains of matrix instructions over ascending dimensions or positions, of
// which each has an order of its own that does not depend on the row or column. A tile or segment that a query vector
// sees nothing of leaves what is known of it as it was, but for the sign of a zero, which the output does not keep.
//
// With g = lane / 4 and t = lane % 4, a lane has vectors g and g + 8, and of them what mma_16x8x16's d has.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

constexpr int kKeyTile = 64;  // positions
constexpr int kSegmentTiles = static_cast<int>(kSegment) / kKeyTile;
constexpr int kWarpVectors = 16;
constexpr float kUnseen = -__builtin_huge_valf();  // the score of a position that is not seen

// A tile's columns of K or V lie in shared memory in panels of this many.
template <int kDim>
constexpr int kPanelDim = kDim < 128 ? kDim : 128;

// kKeyTile rows of kPanelDim elements. The 16-byte chunks of a row are permuted, so that chunks of one column in eight
// successive rows lie in different banks.
template <int kDim>
struct Panel {
  static constexpr int kChunks = kPanelDim<kDim> / 8;
  static constexpr int kRowBytes = kPanelDim<kDim> * 2;
  static constexpr int kBytes = kKeyTile * kRowBytes;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
};

// Over the part of a segment that was taken.
template <int kColumns>
struct SegmentState {
  float max[2];            // of score · scale
  float sum[4];            // Σ weight of g in [0] and [1], of g + 8 in [2] and [3]
  float out[kColumns][4];  // Σ weight · V

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = kUnseen;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }
};

// score[n] = q · K of the 8 positions from row first + 8n of the tile on; `keys` are panels, one after the other.
// query(k, a) gives the 16 vectors' dimensions from 16k on as a matrix instruction wants them.
template <class T, int kDim, int kColumns, class Query>
__device__ __forceinline__ void score_positions(const unsigned char* keys, int first, Query query,
                                                float (&score)[kColumns][4]) {
  const int lane = threadIdx.x % kWarp, half = lane / 8 % 2;
  const int row = first + lane / 16 * 8 + lane % 8;
  constexpr int kPanelSteps = kPanelDim<kDim> / 16;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[n][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    query(k, a);
    const unsigned char* column =
        keys + k / kPanelSteps * Panel<kDim>::kBytes + Panel<kDim>::offset(row, k % kPanelSteps * 2 + half);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      load_matrices(b, column + n * 8 * Panel<kDim>::kRowBytes);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_16x8x16<T>(score[n], a, low);
      mma_16x8x16<T>(score[n + 1], a, high);
    }
  }
}

// Hides the positions from `context` on of vector g, and from `next_context` on of g + 8, of a tile's scores; both
// counted from the tile's first.
__device__ __forceinline__ void hide_unseen(float (&score)[kKeyTile / 8][4], int context, int next_context) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + column + i % 2 >= (i < 2 ? context : next_context)) score[n][i] = kUnseen;
    }
  }
}

// Takes a tile's scores into the state's maximum and scales the state down to it. `weight` are 2^(score · scale - max)
// in 16 bits, as a matrix instruction wants them.
template <class T, int kColumns>
__device__ __forceinline__ void soften(float (&score)[kKeyTile / 8][4], float scale, SegmentState<kColumns>& state,
                                       uint32_t (&weight)[kKeyTile / 16][4]) {
  float keep[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = kUnseen;
#pragma unroll
    for (int n = 0; n < kKeyTile / 8; ++n) largest = fmaxf(largest, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const float max = fmaxf(state.max[h], largest * scale);
    const float reference = max == kUnseen ? 0.0f : max;  // -∞ - -∞ is no number
    keep[h] = exp2_fast(state.max[h] - reference);
    state.max[h] = max;
#pragma unroll
    for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) score[n][i] = exp2_fast(fmaf(score[n][i], scale, -reference));
    }
  }
#pragma unroll
  for (int k = 0; k < kKeyTile / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &score[2 * k + i / 2][i % 2 * 2];
      weight[k][i] = pack<T>(pair[0], pair[1]);
    }
  }
  // Mostly the maximum stays, and a product with 1 changes nothing.
  if (__any_sync(kAllLanes, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.sum[i] *= keep[i / 2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[n][i] *= keep[i / 2];
    }
  }
}

// Adds a tile's weights, and weights · V of the 8 · kColumns elements from chunk `first` of a panel's rows on.
template <class T, int kDim, int kColumns>
__device__ __forceinline__ void weigh_values(const unsigned char* values, int first,
                                             const uint32_t (&weight)[kKeyTile / 16][4],
                                             SegmentState<kColumns>& state) {
  const int lane = threadIdx.x % kWarp, row = lane % 16;
  const uint32_t one = pack<T>(1.0f, 1.0f);
  const uint32_t ones[2] = {one, one};
#pragma unroll
  for (int k = 0; k < kKeyTile / 16; ++k) {
    mma_16x8x16<T>(state.sum, weight[k], ones);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(
          b, values + 16 * k * Panel<kDim>::kRowBytes + Panel<kDim>::offset(row, first + n + lane / 16));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_16x8x16<T>(state.out[n], weight[k], low);
      mma_16x8x16<T>(state.out[n + 1], weight[k], high);
    }
  }
}

template <class T>
constexpr uint32_t kInfinity = 0;
template <>
inline constexpr uint32_t kInfinity<Bf16> = 0x7f80;
template <>
inline constexpr uint32_t kInfinity<Half> = 0x7c00;

// The halves of a pair of 16-bit elements that are infinite or no number, as ones.
template <class T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = kInfinity<T>;
  const uint32_t low = (pair & kExponent) == kExponent ? 0xffffu : 0u;
  return low | ((pair >> 16 & kExponent) == kExponent ? 0xffff0000u : 0u);
}

// The same for a tile that some of the vectors see a part of only: what others see of it may be infinite or no number,
// and a weight of 0 would make that a sum of no number. `context` and `next_context` as in hide_unseen().
template <class T, int kDim, int kColumns>
__device__ __forceinline__ void weigh_seen_values(const unsigned char* values, int first,
                                                  const uint32_t (&weight)[kKeyTile / 16][4], int context,
                                                  int next_context, SegmentState<kColumns>& state) {
  const int lane = threadIdx.x % kWarp, row = lane % 16;
  const uint32_t one = pack<T>(1.0f, 1.0f);
  const uint32_t ones[2] = {one, one};
#pragma unroll
  for (int k = 0; k < kKeyTile / 16; ++k) {
    uint32_t seen[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 16 * k + i / 2 * 8 + lane % 4 * 2, end = i % 2 == 0 ? context : next_context;
      seen[i] = pack<T>(column < end ? 1.0f : 0.0f, column + 1 < end ? 1.0f : 0.0f);
    }
    mma_16x8x16<T>(state.sum, weight[k], ones);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(
          b, values + 16 * k * Panel<kDim>::kRowBytes + Panel<kDim>::offset(row, first + n + lane / 16));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&out)[4] = state.out[n + half];
        const uint32_t wrong[2] = {not_finite<T>(b[2 * half]), not_finite<T>(b[2 * half + 1])};
        const uint32_t right[2] = {b[2 * half] & ~wrong[0], b[2 * half + 1] & ~wrong[1]};
        mma_16x8x16<T>(out, weight[k], right);
        if (__any_sync(kAllLanes, (wrong[0] | wrong[1]) != 0)) {
          float count[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          const uint32_t marks[2] = {wrong[0] & one, wrong[1] & one};
          mma_16x8x16<T>(count, seen, marks);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (count[i] != 0.0f) out[i] = __uint_as_float(0x7fc00000u);
          }
        }
      }
    }
  }
}

// How a segment joins what was merged before: whichever of the two has the smaller maximum is scaled down.
struct Fold {
  float keep, take;

  __device__ __forceinline__ float operator()(float total, float part) const { return fmaf(part, take, total * keep); }
};

// Folds a segment's maximum and sum into `max` and `sum`, which are kUnseen and 0 at first.
__device__ __forceinline__ Fold fold_segment(float segment_max, float segment_sum, float& max, float& sum) {
  const float largest = fmaxf(max, segment_max);
  const float reference = largest == kUnseen ? 0.0f : largest;
  const Fold fold = {exp2_fast(max - reference), exp2_fast(segment_max - reference)};
  sum = fold(sum, segment_sum);
  max = largest;
  return fold;
}

// An element of the output.
__device__ __forceinline__ float finish(float total, float inverse_sum) { return fmaf(total, inverse_sum, 0.0f); }

// Over the segments that were merged.
template <int kColumns>
struct MergedState {
  float max[2], sum[2];  // of g and g + 8
  float out[kColumns][4];

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = kUnseen;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void merge(const SegmentState<kColumns>& segment) {
    const Fold fold[2] = {fold_segment(segment.max[0], segment.sum[0], max[0], sum[0]),
                          fold_segment(segment.max[1], segment.sum[2], max[1], sum[1])};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = fold[i / 2](out[n][i], segment.out[n][i]);
    }
  }
};

// ---- query vectors and outputs: rows of `head_dim` elements wherever they begin

// Elements d and d + 1, of which those from head_dim on are zero; d is even.
template <class T>
__device__ __forceinline__ uint32_t load_pair(const T* vector, int d, int head_dim) {
  if (d >= head_dim) return 0;
  if (head_dim % 2 == 0) return *reinterpret_cast<const uint32_t*>(vector + d);
  return vector[d].bits | (d + 1 < head_dim ? static_cast<uint32_t>(vector[d + 1].bits) << 16 : 0u);
}

template <class T>
__device__ __forceinline__ void store_pair(T* vector, int d, int head_dim, float first, float second) {
  if (d >= head_dim) return;
  if (head_dim % 2 == 0) {
    *reinterpret_cast<uint32_t*>(vector + d) = pack<T>(first, second);
  } else {
    vector[d] = narrow<T>(first);
    if (d + 1 < head_dim) vector[d + 1] = narrow<T>(second);
  }
}

}  // namespace fastserve::cuda
