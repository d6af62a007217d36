// What becomes of a product's sums, the same in every kernel: parts in ascending order, int8's scale, bias, what the
// output held; or gate and up, which meet.
#pragma once

#include "backend/cuda/activation.cuh"
#include "backend/cuda/kernels.h"
#include "backend/cuda/simt.cuh"
#include "backend/cuda/vector.cuh"

namespace fastserve::cuda {

// The slab of 64 inputs at which a part begins. Depends on k alone.
__device__ __forceinline__ int part_begin(int slabs, int part) { return slabs * part / kGemmParts; }

// Where several outputs are made, all that they need besides sums is read before the first is written: the compiler
// moves no load across a store, which might be to the same place, so each would be a way to the memory and back of its
// own.

// What has to be added where there is nothing to add: no sum's bits change by it, and no branch parts those that are
// written together. (To add 0 would make 0 of -0.)
constexpr float kNothing = -0.0f;

// What one output takes besides its sum.
template <bool kScaled>
struct OutputTerms {
  float scale = 1.0f, bias = kNothing, held = kNothing;

  __device__ __forceinline__ void read(const GemmCall& call, int64_t row, int64_t column) {
    if constexpr (kScaled) scale = static_cast<const float*>(call.weight.scales)[column];
    if (call.bias != nullptr) bias = call.bias[column];
    if (call.accumulate) held = static_cast<const float*>(call.output)[row * call.ld_output + column];
  }
  // What the product's column is of that sum.
  __device__ __forceinline__ float finish(float sum) const {
    if constexpr (kScaled) sum *= scale;
    return held + (sum + bias);
  }
};

// Writes a column of a product that is not gated.
template <class T>
__device__ __forceinline__ void put(const GemmCall& call, int64_t row, int64_t column, float value) {
  const int64_t index = row * call.ld_output + column;
  if (call.wide) {
    static_cast<float*>(call.output)[index] = value;
  } else {
    static_cast<T*>(call.output)[index] = narrow<T>(value);
  }
}

// What two neighbouring columns make together, in a product that is gated: activate()'s bits of what would be stored.
template <class T>
__device__ __forceinline__ float meet(float gate, float up) {
  const uint32_t stored = pack<T>(gate, up);
  return activated<Activation::kSilu>(widen(T{static_cast<uint16_t>(stored)})) *
         widen(T{static_cast<uint16_t>(stored >> 16)});
}

struct Eight {
  float x[8] = {kNothing, kNothing, kNothing, kNothing, kNothing, kNothing, kNothing, kNothing};
};

// What 8 neighbouring columns have, from a multiple of 8 on; as much is 16-byte aligned.
template <bool kScaled>
struct ColumnTerms {
  Eight scales, biases;

  __device__ __forceinline__ void read(const GemmCall& call, int64_t column) {
    if constexpr (kScaled) load(scales.x, static_cast<const float*>(call.weight.scales) + column);
    if (call.bias != nullptr) load(biases.x, call.bias + column);
  }
};

// What 8 neighbouring outputs hold, if it is to be added to.
__device__ __forceinline__ void read_held(Eight& held, const GemmCall& call, int64_t row, int64_t column) {
  if (call.accumulate) load(held.x, static_cast<const float*>(call.output) + row * call.ld_output + column);
}

// Writes 8 neighbouring columns from one on that is a multiple of 8, or as many as there are, of a product that is not
// gated. If all are there, `terms` and `held` have been read.
template <class T, bool kScaled>
__device__ __forceinline__ void put_eight(const GemmCall& call, int64_t row, int64_t column, float (&sums)[8],
                                          const ColumnTerms<kScaled>& terms, const Eight& held) {
  if (column + 8 > call.weight.n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i >= call.weight.n) continue;
      OutputTerms<kScaled> own;
      own.read(call, row, column + i);
      put<T>(call, row, column + i, own.finish(sums[i]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (kScaled) sums[i] *= terms.scales.x[i];
    sums[i] = held.x[i] + (sums[i] + terms.biases.x[i]);
  }
  const int64_t index = row * call.ld_output + column;
  if (call.wide) {
    float* output = static_cast<float*>(call.output) + index;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      store_vector(output + i, {__float_as_uint(sums[i]), __float_as_uint(sums[i + 1]), __float_as_uint(sums[i + 2]),
                                __float_as_uint(sums[i + 3])});
    }
  } else {
    store_vector(static_cast<T*>(call.output) + index, {pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]),
                                                        pack<T>(sums[4], sums[5]), pack<T>(sums[6], sums[7])});
  }
}
template <class T, bool kScaled>
__device__ __forceinline__ void put_eight(const GemmCall& call, int64_t row, int64_t column, float (&sums)[8]) {
  ColumnTerms<kScaled> terms;
  Eight held;
  if (column + 8 <= call.weight.n) {
    terms.read(call, column);
    read_held(held, call, row, column);
  }
  put_eight<T, kScaled>(call, row, column, sums, terms, held);
}

// Int8's scales of 8 neighbouring columns from a multiple of 8 on, as far as there are any.
template <bool kScaled>
__device__ __forceinline__ void read_scales(Eight& scales, const GemmCall& call, int64_t column) {
  if constexpr (kScaled) {
    const auto* from = static_cast<const float*>(call.weight.scales) + column;
    if (column + 8 <= call.weight.n) return load(scales.x, from);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < call.weight.n) scales.x[i] = from[i];
    }
  }
}

// Writes what 8 neighbouring columns of a gated product make, from one on that is a multiple of 8, or as many as there
// are.
template <class T, bool kScaled>
__device__ __forceinline__ void put_pairs(const GemmCall& call, int64_t row, int64_t column, const float (&sums)[8],
                                          const Eight& scales) {
  float outputs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float gate = sums[2 * i], up = sums[2 * i + 1];
    if constexpr (kScaled) {
      gate *= scales.x[2 * i];
      up *= scales.x[2 * i + 1];
    }
    outputs[i] = meet<T>(gate, up);
  }
  T* to = static_cast<T*>(call.output) + row * call.ld_output + column / 2;
  if (column + 8 <= call.weight.n) return store(to, outputs);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + 2 * i < call.weight.n) to[i] = narrow<T>(outputs[i]);
  }
}

// A quad is matrix fragments of four tiles of 8 columns, of 16 rows. Each lane has 2 columns of each tile, of row
// `half` times 8 and lane / 4; four lanes exchange them so that each has 8 columns of one tile, and writes are of whole
// vectors.
__device__ __forceinline__ void exchange(float (&x)[8], const float* quad, int half, int lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = quad[i / 2 * 4 + half * 2 + i % 2];
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((i / 2 & bit) != 0) continue;
      const float given = __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + 2 * bit], bit);
      x[i] = upper ? given : x[i];
      x[i + 2 * bit] = upper ? x[i + 2 * bit] : given;
    }
  }
}

// So many quads ahead of the one that is written, what outputs hold is read: a way to the memory takes as long as some
// of them do.
constexpr int kQuadsAhead = 3;

template <class T, bool kScaled, int kQuads, int kDown, int kAcross>
__device__ __forceinline__ void put_paired_quads(const GemmCall& call, int64_t row, int64_t column, const float* sums,
                                                 int lane) {
  Eight scales;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const int64_t first = row + quad * kDown, at = column + quad * kAcross;
    if (kAcross != 0 || quad == 0) read_scales<kScaled>(scales, call, at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
      exchange(x, sums + quad * 16, half, lane);
      if (first + half * 8 < call.m && at < call.weight.n) {
        put_pairs<T, kScaled>(call, first + half * 8, at, x, scales);
      }
    }
  }
}

// Writes the sums of a warp, 16 of a lane for each quad: the first one's rows begin at `row` and its columns at
// `column`, those of each next one kDown and kAcross further on.
template <class T, bool kScaled, int kQuads, int kDown, int kAcross>
__device__ __forceinline__ void put_quads(const GemmCall& call, int64_t row, int64_t column, const float* sums,
                                          int lane) {
  row += lane / 4;
  column += lane % 4 * 8;
  if (call.gated) return put_paired_quads<T, kScaled, kQuads, kDown, kAcross>(call, row, column, sums, lane);
  ColumnTerms<kScaled> terms[kAcross == 0 ? 1 : kQuads];
  Eight held[kQuads][2];
#pragma unroll
  for (int turn = 0; turn < kQuads + kQuadsAhead; ++turn) {
    if (turn < kQuads) {
      const int64_t first = row + turn * kDown, at = column + turn * kAcross;
      if (at + 8 <= call.weight.n) {
        if (kAcross != 0 || turn == 0) terms[kAcross == 0 ? 0 : turn].read(call, at);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (first + half * 8 < call.m) read_held(held[turn][half], call, first + half * 8, at);
        }
      }
    }
    const int quad = turn - kQuadsAhead;
    if (quad < 0) continue;
    const int64_t first = row + quad * kDown, at = column + quad * kAcross;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
      exchange(x, sums + quad * 16, half, lane);
      if (first + half * 8 < call.m && at < call.weight.n) {
        put_eight<T, kScaled>(call, first + half * 8, at, x, terms[kAcross == 0 ? 0 : quad], held[quad][half]);
      }
    }
  }
}

}  // namespace fastserve::cuda
