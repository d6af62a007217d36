// How the operands of a product reach the matrix instructions: slabs of 64 inputs are copied to shared memory, and
// fragments read from there. Weights of other formats become the activations' type on the way.
#pragma once

#include "backend/cuda/kernels.h"
#include "backend/cuda/quantized_layout.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

constexpr int kChunk = 16;                      // bytes of one asynchronous copy
constexpr int kSteps = kSlab / 16;              // matrix instructions along a slab
constexpr int kRowChunks = kSlab * 2 / kChunk;  // of a row of a slab of 16-bit elements
constexpr int kRowBytes = kRowChunks * kChunk;

// Rows of 16-bit elements lie in shared memory with their chunks permuted, so that the same chunk of 8 neighbouring
// rows, which is what load_matrices reads at once, is in 8 different groups of banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * kChunk; }

// Copies slabs of kRows rows, or units, of kChunks chunks each by kThreads threads. Rows beyond the matrix repeat its
// last one: nobody uses what becomes of them. kConstant: of what no kernel writes.
template <int kRows, int kChunks, int kThreads, bool kSwizzle, bool kConstant>
class SlabCopy {
 public:
  // Rows are `pitch` chunks apart.
  __device__ __forceinline__ SlabCopy(const void* base, int64_t pitch, int64_t first_row, int64_t rows, int thread)
      : base_(static_cast<const char*>(base)), thread_(thread) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = thread + i * kThreads;
      const int64_t row = first_row + index / kChunks;
      offset_[i] = static_cast<uint32_t>((row < rows ? row : rows - 1) * pitch + index % kChunks);
    }
  }
  __device__ __forceinline__ void operator()(char* to, int slab) const {
    const char* from = base_ + static_cast<int64_t>(slab) * (kChunks * kChunk);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = thread_ + i * kThreads;
      if (kTotal % kThreads != 0 && index >= kTotal) break;
      const int place = kSwizzle ? swizzled(index / kChunks, index % kChunks) : index * kChunk;
      if constexpr (kConstant) {
        copy_constant_async(to + place, from + static_cast<int64_t>(offset_[i]) * kChunk);
      } else {
        copy_async(to + place, from + static_cast<int64_t>(offset_[i]) * kChunk);
      }
    }
  }

 private:
  static constexpr int kTotal = kRows * kChunks, kCopies = (kTotal + kThreads - 1) / kThreads;
  const char* base_;
  int thread_;
  uint32_t offset_[kCopies];  // in chunks: matrices are smaller than 64 GiB
};

// A of one step, from rows [0, 16) at `slab`.
__device__ __forceinline__ void load_activations(uint32_t (&a)[4], const char* slab, int step, int lane) {
  load_matrices(a, slab + swizzled(lane % 16, 2 * step + lane / 16));
}

// ---- weights: kTiles tiles of 8 outputs. Fragments reads a slab; step() gives B of every tile for one step. They are
// constant from before the first launch that has them: CudaMatrix waits for each of its uploads, and so does whoever
// else makes weights.

template <class T>
struct PlainWeights {
  using Element = T;
  static constexpr bool kScaled = false;
  static constexpr int kTileBytes = kUnitOutputs * kRowBytes, kScaleBytes = 0;  // in shared memory, of a tile of a slab

  template <int kTiles, int kThreads>
  class Copy {
   public:
    __device__ __forceinline__ Copy(const DeviceMatrix& matrix, int64_t first_output, int thread)
        : values_(matrix.data, matrix.k_padded * 2 / kChunk, first_output, matrix.n, thread) {}
    __device__ __forceinline__ void operator()(char* to, char*, int slab) const { values_(to, slab); }

   private:
    SlabCopy<kTiles * kUnitOutputs, kRowChunks, kThreads, true, true> values_;
  };

  template <int kTiles>
  class Fragments {
   public:
    __device__ __forceinline__ Fragments(const char* slab, const char*, int lane)
        : slab_(slab), row_(lane % 8 + lane / 16 * 8), half_(lane / 8 % 2) {}
    __device__ __forceinline__ void step(int step, uint32_t (&b)[kTiles][2]) const {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t r[4];
        load_matrices(r, slab_ + swizzled(tile * kUnitOutputs + row_, 2 * step + half_));
        b[tile][0] = r[0];
        b[tile][1] = r[1];
        b[tile + 1][0] = r[2];
        b[tile + 1][1] = r[3];
      }
    }

   private:
    const char* slab_;
    int row_, half_;
  };
};

template <class T, WeightFormat kFormat>
struct QuantizedWeights {
  using Element = T;
  static constexpr bool kScaled = kFormat == WeightFormat::kInt8;
  static constexpr int kTileBytes = unit_bytes(kFormat), kScaleBytes = unit_scale_bytes(kFormat);

  template <int kTiles, int kThreads>
  class Copy {
   public:
    __device__ __forceinline__ Copy(const DeviceMatrix& matrix, int64_t first_output, int thread)
        : values_(matrix.data, matrix.k_padded / kSlab * kChunks, first_output / kUnitOutputs, units(matrix), thread),
          scales_(matrix.scales, matrix.k_padded / kSlab * kScaleChunks, first_output / kUnitOutputs, units(matrix),
                  thread) {}
    __device__ __forceinline__ void operator()(char* values, char* scales, int slab) const {
      values_(values, slab);
      if constexpr (kScaleBytes > 0) scales_(scales, slab);
    }

   private:
    static constexpr int kChunks = kTileBytes / kChunk;
    static constexpr int kScaleChunks = kScaleBytes > 0 ? kScaleBytes / kChunk : 1;
    static __device__ __forceinline__ int64_t units(const DeviceMatrix& matrix) {
      return (matrix.n + kUnitOutputs - 1) / kUnitOutputs;
    }
    SlabCopy<kTiles, kChunks, kThreads, false, true> values_;
    SlabCopy<kTiles, kScaleChunks, kThreads, false, true> scales_;
  };

  template <int kTiles>
  class Fragments {
   public:
    __device__ __forceinline__ Fragments(const char* values, const char* scales, int lane) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (kNibbles) {
          const uint2 words = reinterpret_cast<const uint2*>(values + tile * kTileBytes)[lane];
          words_[tile][0] = words.x;
          words_[tile][1] = words.y;
        } else {
          const uint4 words = reinterpret_cast<const uint4*>(values + tile * kTileBytes)[lane];
          words_[tile][0] = words.x;
          words_[tile][1] = words.y;
          words_[tile][2] = words.z;
          words_[tile][3] = words.w;
        }
        const char* scale = scales + tile * kScaleBytes;
        if constexpr (kFormat == WeightFormat::kQ8_0 || kFormat == WeightFormat::kQ4_0) {
          const uint32_t both = reinterpret_cast<const uint32_t*>(scale)[lane / 4];
          scale_[tile][0] = half(both);
          scale_[tile][1] = half(both >> 16);
        } else if constexpr (kFormat == WeightFormat::kQ4_1) {
          const uint2 both = reinterpret_cast<const uint2*>(scale)[lane / 4];
          scale_[tile][0] = half(both.x);
          minimum_[tile][0] = half(both.x >> 16);
          scale_[tile][1] = half(both.y);
          minimum_[tile][1] = half(both.y >> 16);
        }
      }
    }
    __device__ __forceinline__ void step(int step, uint32_t (&b)[kTiles][2]) const {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (kNibbles) {
          nibbles(words_[tile][step / 2] >> (step % 2 * 8), tile, step / 2, b[tile]);
        } else {
          bytes(words_[tile][step], tile, step / 2, b[tile]);
        }
      }
    }

   private:
    static constexpr bool kNibbles = has_nibbles(kFormat);

    static __device__ __forceinline__ float half(uint32_t bits) { return widen(Half{static_cast<uint16_t>(bits)}); }
    __device__ __forceinline__ void bytes(uint32_t word, int tile, int group, uint32_t (&b)[2]) const {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // The byte as the last of 2^23's mantissa; exact from there on.
        x[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | i)) - (8388608.0f + 128.0f);
        if constexpr (kFormat == WeightFormat::kQ8_0) x[i] *= scale_[tile][group];
      }
      b[0] = pack<T>(x[0], x[1]);
      b[1] = pack<T>(x[2], x[3]);
    }
    // The lower 8 bits of each half of the word.
    __device__ __forceinline__ void nibbles(uint32_t word, int tile, int group, uint32_t (&b)[2]) const {
      // A nibble becomes 128 + q, and so the offset is less: (128 + q) · scale + (minimum - 128 · scale), which rounds
      // once, because 136 · scale and, unless the minimum is below 2^-6 of the scale, minimum - 128 · scale are exact.
      const float scale = scale_[tile][group];
      const float offset =
          kFormat == WeightFormat::kQ4_0 ? -136.0f * scale : fmaf(-128.0f, scale, minimum_[tile][group]);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t two = (word >> (4 * pair) & 0x000f000fu) | 0x43004300u;  // 128 + q as bfloat16
        b[pair] = pack<T>(fmaf(__uint_as_float(two << 16), scale, offset),
                          fmaf(__uint_as_float(two & 0xffff0000u), scale, offset));
      }
    }

    uint32_t words_[kTiles][kNibbles ? 2 : 4];
    float scale_[kTiles][2];    // of the groups of the slab; not for int8
    float minimum_[kTiles][2];  // q4_1
  };
};

}  // namespace fastserve::cuda
