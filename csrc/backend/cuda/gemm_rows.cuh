// Products of few rows: what bounds them is reading the weights. A block has a few outputs; each of its warps sums one
// part of the inputs, with copies of its own in flight and no barrier until the parts are added.
#pragma once

#include "backend/cuda/gemm_epilogue.cuh"
#include "backend/cuda/gemm_operands.cuh"
#include "backend/cuda/gemm_plan.h"

namespace fastserve::cuda {

template <class Weights, int kRows, int kTiles, int kStages>
struct RowsKernel {
  static_assert(kRows == 8 || kRows == 16);
  using T = typename Weights::Element;
  static constexpr int kColumns = kTiles * kUnitOutputs;
  static constexpr int kActivationBytes = kRows * kRowBytes, kWeightBytes = kTiles * Weights::kTileBytes;
  static constexpr int kStageBytes = kActivationBytes + kWeightBytes + kTiles * Weights::kScaleBytes;
  static constexpr int kRingBytes = (kStages * kStageBytes + 127) / 128 * 128;
  static constexpr int kSharedBytes = kGemmParts * kRingBytes;
  static_assert(kSharedBytes >= kGemmParts * kRows * kColumns * 4);

  // One warp's part, into sums. Waits for the predecessor, before which it copies weights only.
  static __device__ __forceinline__ void sum_part(const GemmCall& call, int64_t first_row, int64_t first_column,
                                                  int part, int lane, float (&sums)[kTiles][4]) {
    char* ring = shared_memory<char>() + part * kRingBytes;
    const int slabs = static_cast<int>(call.weight.k_padded / kSlab);
    const int begin = part_begin(slabs, part), end = part_begin(slabs, part + 1);
    const int rows = static_cast<int>(call.m - first_row < kRows ? call.m - first_row : kRows);

    // Rows that the call does not have stay zero.
    for (int i = rows * kRowChunks + lane; i < kRows * kRowChunks; i += kWarp) {
      for (int stage = 0; stage < kStages; ++stage) {
        *reinterpret_cast<uint4*>(ring + stage * kStageBytes + i * kChunk) = {0, 0, 0, 0};
      }
    }
    const typename Weights::template Copy<kTiles, kWarp> copy_weights(call.weight, first_column, lane);
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
    const char* input = static_cast<const char*>(call.input) +
                        ((first_row + lane / kRowChunks) * call.ld_input * 2 + lane % kRowChunks * kChunk);
    const auto issue_rows = [&](int slab, int stage) {
      char* to = ring + stage * kStageBytes;
      constexpr int kRowsAtOnce = kWarp / kRowChunks;
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int row = lane / kRowChunks + i * kRowsAtOnce;
        if (row < rows) {
          copy_async(to + swizzled(row, lane % kRowChunks),
                     input + i * kRowsAtOnce * call.ld_input * 2 + static_cast<int64_t>(slab) * kRowBytes);
        }
      }
    };
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (begin + stage < end) issue_rows(begin + stage, stage);
      commit_copies();
    }
    int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
    for (int slab = begin; slab < end; ++slab) {
      wait_copies<kStages - 2>();
      __syncwarp();  // and nobody reads free_stage any more
      if (slab + kStages - 1 < end) {
        issue_weights(slab + kStages - 1, free_stage);
        issue_rows(slab + kStages - 1, free_stage);
      }
      commit_copies();
      const char* at = ring + stage * kStageBytes;
      uint32_t a[kSteps][4];
      load_slab(a, at, lane);
      const typename Weights::template Fragments<kTiles> fragments(at + kActivationBytes,
                                                                   at + kActivationBytes + kWeightBytes, lane);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[kTiles][2];
        fragments.step(step, b);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_16x8x16<T>(sums[tile], a[step], b[tile]);
      }
      free_stage = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

  static __device__ __forceinline__ void load_slab(uint32_t (&a)[kSteps][4], const char* slab, int lane) {
    if constexpr (kRows == 16) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_activations(a[step], slab, step, lane);
    } else {
      // Four chunks of 8 rows are two steps, without rows 8 to 15.
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t r[4];
        load_matrices(r, slab + swizzled(lane % 8, 2 * step + lane / 8));
        a[step][0] = r[0];
        a[step][2] = r[1];
        a[step + 1][0] = r[2];
        a[step + 1][2] = r[3];
        a[step][1] = a[step][3] = a[step + 1][1] = a[step + 1][3] = 0;
      }
    }
  }
};

template <class Weights, int kRows, int kTiles, int kStages>
__global__ void __launch_bounds__(kGemmParts* kWarp) gemm_rows_kernel(GemmCall call) {
  let_next_begin();  // sum_part() waits
  using Kernel = RowsKernel<Weights, kRows, kTiles, kStages>;
  using T = typename Weights::Element;
  constexpr int kColumns = Kernel::kColumns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, part = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  float sums[kTiles][4] = {};
  Kernel::sum_part(call, first_row, first_column, part, lane, sums);

  // What the outputs hold is read before anything is written, and on its way while parts meet.
  constexpr int kThreads = kGemmParts * kWarp, kOutputs = kRows * kColumns / kThreads;  // of a thread
  static_assert(kRows * kColumns % kThreads == 0);
  const auto row_of = [&](int i) { return first_row + (static_cast<int>(threadIdx.x) + i * kThreads) / kColumns; };
  const auto column_of = [&](int i) {
    return first_column + (static_cast<int>(threadIdx.x) + i * kThreads) % kColumns;
  };
  const auto exists = [&](int i) { return row_of(i) < call.m && column_of(i) < call.weight.n; };
  OutputTerms<Weights::kScaled> terms[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    if (exists(i)) terms[i].read(call, row_of(i), column_of(i));
  }
  __syncthreads();                        // the rings are free
  float* parts = shared_memory<float>();  // [part][row][column]
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float* at = parts + (part * kRows + lane / 4) * kColumns + tile * kUnitOutputs + lane % 4 * 2;
    at[0] = sums[tile][0];
    at[1] = sums[tile][1];
    if constexpr (kRows == 16) {
      at[8 * kColumns] = sums[tile][2];
      at[8 * kColumns + 1] = sums[tile][3];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const float* of_parts = parts + static_cast<int>(threadIdx.x) + i * kThreads;
    float value = of_parts[0];
#pragma unroll
    for (int p = 1; p < kGemmParts; ++p) value += of_parts[p * kRows * kColumns];
    value = terms[i].finish(value);
    if (call.gated) {  // the next lane has the next column
      const float next = __shfl_down_sync(kAllLanes, value, 1);
      if (lane % 2 == 0 && exists(i)) {
        static_cast<T*>(call.output)[row_of(i) * call.ld_output + column_of(i) / 2] = narrow<T>(meet<T>(value, next));
      }
    } else if (exists(i)) {
      put<T>(call, row_of(i), column_of(i), value);
    }
  }
}

}  // namespace fastserve::cuda
