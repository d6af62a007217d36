// Products of many rows: a block has a tile of the output, its warps parts of that, and all share the copies. The
// parts of the inputs are summed one after the other, or (kSplit) by a block each, the last of which adds them.
#pragma once

#include "backend/cuda/gemm_epilogue.cuh"
#include "backend/cuda/gemm_operands.cuh"
#include "backend/cuda/gemm_plan.h"

namespace fastserve::cuda {

constexpr int kWarpTiles = 4, kWarpColumns = kWarpTiles * kUnitOutputs;  // of every warp
// Row tiles that go through the columns together: their rows, and the columns under way, stay in the L2 cache.
constexpr int kBandTiles = 16;

template <class Weights, int kRows, int kColumns, int kWarpRows, int kStages, bool kSplit>
struct TilesKernel {
  using T = typename Weights::Element;
  static constexpr int kAcross = kColumns / kWarpColumns, kThreads = kRows / kWarpRows * kAcross * kWarp;
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kColumns / kUnitOutputs;
  static constexpr int kActivationBytes = kRows * kRowBytes, kWeightBytes = kColumnTiles * Weights::kTileBytes;
  static constexpr int kStageBytes = kActivationBytes + kWeightBytes + kColumnTiles * Weights::kScaleBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kStageBytes % 128 == 0);

  using Sums = float[kRowTiles][kWarpTiles][4];

  // Adds the products of one slab, which is in shared memory at `stage`.
  static __device__ __forceinline__ void multiply(const char* stage, int warp, int lane, Sums& sums) {
    const char* rows = stage + warp / kAcross * kWarpRows * kRowBytes;
    const int tile = warp % kAcross * kWarpTiles;
    const char* weights = stage + kActivationBytes;
    const typename Weights::template Fragments<kWarpTiles> fragments(
        weights + tile * Weights::kTileBytes, weights + kWeightBytes + tile * Weights::kScaleBytes, lane);
    uint32_t a[2][kRowTiles][4], b[2][kWarpTiles][2];  // of this step and the next
    const auto load = [&](int step) {
      fragments.step(step, b[step % 2]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) load_activations(a[step % 2][r], rows + r * 16 * kRowBytes, step, lane);
    };
    load(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) load(step + 1);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < kWarpTiles; ++c) mma_16x8x16<T>(sums[r][c], a[step % 2][r], b[step % 2][c]);
      }
    }
  }

  // The parts [first_part, last_part), each summed from zero, added in ascending order. Waits for the predecessor,
  // before which it copies weights only.
  static __device__ __forceinline__ void sum_parts(const GemmCall& call, int64_t first_row, int64_t first_column,
                                                   int first_part, int last_part, Sums& total) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    char* ring = shared_memory<char>();
    const int slabs = static_cast<int>(call.weight.k_padded / kSlab);
    const int begin = part_begin(slabs, first_part), end = part_begin(slabs, last_part);
    const typename Weights::template Copy<kColumnTiles, kThreads> copy_weights(call.weight, first_column, thread);
    // Weights are no kernel's work: their first copies are under way while the predecessor still is. All of them are in
    // the first group of copies, with the first slab of the input. That keeps the first slab waiting for weights that
    // the next ones need, but they have all been asked for at once, and before it.
    const auto issue_weights = [&](int slab, int stage) {
      char* to = ring + stage * kStageBytes + kActivationBytes;
      copy_weights(to, to + kWeightBytes, slab);
    };
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (begin + stage < end) issue_weights(begin + stage, stage);
    }
    wait_for_predecessor();
    const SlabCopy<kRows, kRowChunks, kThreads, true, false> copy_rows(call.input, call.ld_input * 2 / kChunk,
                                                                       first_row, call.m, thread);
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (begin + stage < end) copy_rows(ring + stage * kStageBytes, begin + stage);
      commit_copies();
    }
    const auto issue = [&](int slab, int stage) {
      issue_weights(slab, stage);
      copy_rows(ring + stage * kStageBytes, slab);
    };
    int stage = 0, free_stage = kStages - 1, slab = begin;
#pragma unroll 1
    for (int part = first_part; part < last_part; ++part) {
      Sums sums = {};
#pragma unroll 1
      for (const int part_end = part_begin(slabs, part + 1); slab < part_end; ++slab) {
        wait_copies<kStages - 2>();
        __syncthreads();  // everyone's copies are there, and nobody reads free_stage any more
        if (slab + kStages - 1 < end) issue(slab + kStages - 1, free_stage);
        commit_copies();
        multiply(ring + stage * kStageBytes, warp, lane, sums);
        free_stage = stage;
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < kWarpTiles; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[r][c][i] = part == first_part ? sums[r][c][i] : total[r][c][i] + sums[r][c][i];
          }
        }
      }
    }
  }

  // Leaves this block's part in the workspace; true in the block of a tile that comes last, which then has all parts
  // added up in `sums`.
  static __device__ __forceinline__ bool gather_parts(const GemmCall& call, int tile, int part, Sums& sums) {
    const int thread = static_cast<int>(threadIdx.x);
    constexpr int kVectors = kRowTiles * kWarpTiles;
    auto* counter = static_cast<unsigned*>(call.workspace) + tile;
    auto* parts = reinterpret_cast<float4*>(static_cast<char*>(call.workspace) + kGemmCounterBytes) +
                  static_cast<int64_t>(tile) * kGemmParts * kVectors * kThreads + thread;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float (&s)[4] = sums[v / kWarpTiles][v % kWarpTiles];
      parts[(part * kVectors + v) * kThreads] = {s[0], s[1], s[2], s[3]};
    }
    // One thread's fences do for all: what the others have written is before them through the barrier, and what is
    // before a fence is before what another block reads behind its own (PTX ISA, memory consistency model, "causality
    // order": it is transitive over barriers and patterns of fences). Cooperative groups' grid barrier rests on the
    // same.
    __syncthreads();
    bool last = false;
    if (thread == 0) {
      __threadfence();
      last = atomicAdd(counter, 1u) == kGemmParts - 1;
      __threadfence();
      if (last) *counter = 0;  // for the next product
    }
    if (__syncthreads_or(last) == 0) return false;
    constexpr int kTogether = 2;  // parts whose loads are in flight; with all of them registers would not do
    static_assert(kGemmParts % kTogether == 0);
#pragma unroll 1
    for (int p = 0; p < kGemmParts; p += kTogether) {
      float4 next[kTogether][kVectors];
#pragma unroll
      for (int i = 0; i < kTogether * kVectors; ++i)
        next[i / kVectors][i % kVectors] = parts[(p * kVectors + i) * kThreads];
#pragma unroll
      for (int i = 0; i < kTogether * kVectors; ++i) {
        const int v = i % kVectors;
        const float4 x = next[i / kVectors][v];
        float (&s)[4] = sums[v / kWarpTiles][v % kWarpTiles];
        const bool first = p + i / kVectors == 0;
        s[0] = first ? x.x : s[0] + x.x;
        s[1] = first ? x.y : s[1] + x.y;
        s[2] = first ? x.z : s[2] + x.z;
        s[3] = first ? x.w : s[3] + x.w;
      }
    }
    return true;
  }

  static __device__ __forceinline__ void write(const GemmCall& call, int64_t first_row, int64_t first_column,
                                               const Sums& sums) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int64_t row = first_row + warp / kAcross * kWarpRows;
    const int64_t column = first_column + warp % kAcross * kWarpColumns;
    put_quads<T, Weights::kScaled, kRowTiles, 16, 0>(call, row, column, sums[0][0], lane);
  }
};

// Blocks [tiles of the output] or, split, [tiles][parts].
template <class Weights, int kRows, int kColumns, int kWarpRows, int kStages, bool kSplit>
__global__ void __launch_bounds__(TilesKernel<Weights, kRows, kColumns, kWarpRows, kStages, kSplit>::kThreads, 1)
    gemm_tiles_kernel(GemmCall call) {
  let_next_begin();  // sum_parts() waits
  using Kernel = TilesKernel<Weights, kRows, kColumns, kWarpRows, kStages, kSplit>;
  const int row_tiles = static_cast<int>((call.m + kRows - 1) / kRows);
  const int column_tiles = static_cast<int>((call.weight.n + kColumns - 1) / kColumns);
  const int tile = static_cast<int>(blockIdx.x);
  const int band = tile / (kBandTiles * column_tiles), in_band = tile - band * kBandTiles * column_tiles;
  const int left = row_tiles - band * kBandTiles, height = left < kBandTiles ? left : kBandTiles;
  const int64_t first_row = static_cast<int64_t>(band * kBandTiles + in_band % height) * kRows;
  const int64_t first_column = static_cast<int64_t>(in_band / height) * kColumns;
  typename Kernel::Sums sums = {};
  if constexpr (kSplit) {
    const int part = static_cast<int>(blockIdx.y);
    Kernel::sum_parts(call, first_row, first_column, part, part + 1, sums);
    if (Kernel::gather_parts(call, tile, part, sums)) Kernel::write(call, first_row, first_column, sums);
  } else {
    Kernel::sum_parts(call, first_row, first_column, 0, kGemmParts, sums);
    Kernel::write(call, first_row, first_column, sums);
  }
}

}  // namespace fastserve::cuda
