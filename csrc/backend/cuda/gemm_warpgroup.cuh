// Products of many rows on compute capability 9.0, by matrix instructions of warpgroups. A cluster of two blocks has
// 256 rows; its blocks have half of them each and share the columns, and so the copies of the weights. In a block one
// warpgroup has tiles copied into a ring in shared memory, two multiply and write: those ahead of each other by what
// the ring holds, over one tile of the output after the other.
#pragma once

#include "backend/cuda/gemm_epilogue.cuh"
#include "backend/cuda/gemm_plan.h"
#include "backend/cuda/hopper.cuh"
#include "backend/cuda/quantized_layout.h"

namespace fastserve::cuda {

// What a launch takes: tensor maps of the two operands, whose boxes are what one copy brings.
struct WarpgroupCall {
  CUtensorMap rows, weights;
  GemmCall call;
};

template <class T, int kColumns, int kStages>
struct WarpgroupKernel {
  static constexpr int kBlocks = kWarpgroupBlocks, kRows = kWarpgroupRows;  // of a cluster; of a block
  static constexpr int kMultipliers = 2, kThreads = (1 + kMultipliers) * kWarpgroup;
  static constexpr int kRowBytes = kSlab * 2, kGroupRows = kRows / kMultipliers;
  static constexpr int kActivationBytes = kRows * kRowBytes, kWeightBytes = kColumns * kRowBytes;
  static constexpr int kStageBytes = kActivationBytes + kWeightBytes;
  // Swizzled rows repeat their pattern every so many bytes, and begin at a multiple of that.
  static constexpr int kPattern = 8 * kRowBytes;
  static constexpr int kSharedBytes = kPattern + kStages * (kStageBytes + 2 * static_cast<int>(sizeof(Barrier)));
  static constexpr int kSums = kColumns / 2;  // of a thread
  static_assert(kRowBytes == 128 && kGroupRows == 64);
  static_assert(kActivationBytes % kPattern == 0 && kWeightBytes / kBlocks % kPattern == 0);
  // A block's registers: what a thread has at first and what the roles make of it.
  static constexpr int kCopierRegisters = 24, kMultiplierRegisters = 240;
  static_assert((kCopierRegisters + kMultipliers * kMultiplierRegisters) * kWarpgroup <= 64 * 1024);

  // Tiles go over the rows of a band first, so that these and the columns under way stay in the L2 cache.
  struct Tiles {
    int down, across;
    __device__ __forceinline__ explicit Tiles(const GemmCall& call)
        : down(static_cast<int>((call.m + kBlocks * kRows - 1) / (kBlocks * kRows))),
          across(static_cast<int>((call.weight.n + kColumns - 1) / kColumns)) {}
    __device__ __forceinline__ int count() const { return down * across; }
    // Of the cluster's part of the output.
    __device__ __forceinline__ void place(int tile, int& first_row, int& first_column) const {
      constexpr int kBand = 8;
      const int band = tile / (kBand * across), in_band = tile - band * kBand * across;
      const int left = down - band * kBand, height = left < kBand ? left : kBand;
      first_row = (band * kBand + in_band % height) * (kBlocks * kRows);
      first_column = in_band / height * kColumns;
    }
  };

  // Where the ring is now: a stage, and the parity of its turn.
  struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
      stage = stage + 1 == kStages ? 0 : stage + 1;
      parity ^= stage == 0 ? 1 : 0;
    }
  };

  struct Ring {
    char* stages;
    Barrier* full;   // a block's copies, and its partner's for it, are there
    Barrier* empty;  // no warp of the cluster reads the stage any more: a copy of weights goes to both blocks

    __device__ __forceinline__ explicit Ring(char* shared) {
      const uint32_t past = shared_address(shared) % kPattern;
      stages = shared + (past == 0 ? 0 : kPattern - past);
      full = reinterpret_cast<Barrier*>(stages + kStages * kStageBytes);
      empty = full + kStages;
    }
    __device__ __forceinline__ void init() const {
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(full + stage, 1);
        init_barrier(empty + stage, kBlocks * kMultipliers * kWarpgroup / kWarp);
      }
      publish_barriers();
    }
    __device__ __forceinline__ char* rows(int stage) const { return stages + stage * kStageBytes; }
    __device__ __forceinline__ char* weights(int stage) const { return rows(stage) + kActivationBytes; }
  };

  // One thread of a block. Each block copies its own rows, and half of the weights to both.
  static __device__ __forceinline__ void copy(const WarpgroupCall& given, const Ring& ring, int cluster, int clusters) {
    const Tiles tiles(given.call);
    const int slabs = static_cast<int>(given.call.weight.k_padded / kSlab);
    const int rank = static_cast<int>(cluster_rank());
    constexpr int kShare = kColumns / kBlocks;
    Turn turn;
    for (int tile = cluster; tile < tiles.count(); tile += clusters) {
      int first_row, first_column;
      tiles.place(tile, first_row, first_column);
#pragma unroll 1
      for (int slab = 0; slab < slabs; ++slab) {
        wait_barrier(ring.empty + turn.stage, turn.parity ^ 1);  // at first all are
        arrive_and_expect(ring.full + turn.stage, kStageBytes);
        copy_tile(ring.rows(turn.stage), &given.rows, slab * kSlab, first_row + rank * kRows, ring.full + turn.stage);
        copy_tile_to((1u << kBlocks) - 1, ring.weights(turn.stage) + rank * kShare * kRowBytes, &given.weights,
                     slab * kSlab, first_column + rank * kShare, ring.full + turn.stage);
        turn.next();
      }
    }
  }

  // This warp does not read the stage any more.
  static __device__ __forceinline__ void release(const Ring& ring, int stage, int lane) {
    if (lane < kBlocks) arrive_at(ring.empty + stage, static_cast<unsigned>(lane));
  }

  // The sums of a warpgroup over all parts: each summed from zero, added in ascending order.
  static __device__ __forceinline__ void sum_parts(const Ring& ring, Turn& turn, int slabs, int group, int lane,
                                                   float (&total)[kSums]) {
    const uint64_t a = descriptor(ring.rows(0) + group * kGroupRows * kRowBytes), b = descriptor(ring.weights(0));
    int slab = 0;
#pragma unroll 1
    for (int part = 0; part < kGemmParts; ++part) {
      float sums[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
      fence_sums(sums);
      int before = -1;  // stage of the products under way
#pragma unroll 1
      for (const int end = part_begin(slabs, part + 1); slab < end; ++slab) {
        wait_barrier(ring.full + turn.stage, turn.parity);
        fence_products();  // not between products on the same sums, says PTX; but the assembler adds what is not there
        // Descriptors count in chunks of 16 bytes.
        const auto at = static_cast<uint64_t>(turn.stage) * (kStageBytes / 16);
#pragma unroll
        for (int step = 0; step < kSlab / 16; ++step)
          multiply_async<T, kColumns>(sums, a + at + 2 * step, b + at + 2 * step);
        commit_products();
        wait_products<1>();
        if (before >= 0) release(ring, before, lane);
        before = turn.stage;
        turn.next();
      }
      wait_for_sums(sums);
      if (before >= 0) release(ring, before, lane);
#pragma unroll
      for (int i = 0; i < kSums; ++i) total[i] = part == 0 ? sums[i] : total[i] + sums[i];
    }
  }

  static __device__ __forceinline__ uint64_t descriptor(const char* rows) {
    return matrix_descriptor(shared_address(rows), Swizzle::k128, 16, kPattern);
  }

  static __device__ __forceinline__ void multiply(const WarpgroupCall& given, const Ring& ring, int cluster,
                                                  int clusters) {
    const Tiles tiles(given.call);
    const int slabs = static_cast<int>(given.call.weight.k_padded / kSlab);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread % kWarpgroup / kWarp;
    const int group = __shfl_sync(kAllLanes, thread / kWarpgroup - 1, 0);  // for the compiler to see that all have one
    Turn turn;
    for (int tile = cluster; tile < tiles.count(); tile += clusters) {
      int first_row, first_column;
      tiles.place(tile, first_row, first_column);
      float total[kSums];
      sum_parts(ring, turn, slabs, group, lane, total);
      const int64_t row = first_row + static_cast<int>(cluster_rank()) * kRows + group * kGroupRows + warp * 16;
      put_quads<T, false, kColumns / 32, 0, 32>(given.call, row, first_column, total, lane);
    }
  }
};

// Blocks [2 · clusters], which take tiles of the output in turn.
template <class T, int kColumns, int kStages>
__global__ void __launch_bounds__(WarpgroupKernel<T, kColumns, kStages>::kThreads, 1)
    gemm_warpgroup_kernel(const __grid_constant__ WarpgroupCall given) {
#if FS_HOPPER
  using Kernel = WarpgroupKernel<T, kColumns, kStages>;
  const typename Kernel::Ring ring(shared_memory<char>());
  const int thread = static_cast<int>(threadIdx.x);
  const int cluster = static_cast<int>(blockIdx.x) / Kernel::kBlocks;
  const int clusters = static_cast<int>(gridDim.x) / Kernel::kBlocks;
  if (thread == 0) ring.init();
  cluster_barrier();
  if (thread < kWarpgroup) {
    give_registers<Kernel::kCopierRegisters>();
    if (thread == 0) Kernel::copy(given, ring, cluster, clusters);
  } else {
    take_registers<Kernel::kMultiplierRegisters>();
    Kernel::multiply(given, ring, cluster, clusters);
  }
  cluster_barrier();  // a block's shared memory is there as long as its partner copies to it and arrives in it
#endif
}

}  // namespace fastserve::cuda
