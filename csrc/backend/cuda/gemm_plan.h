// Which of the kernels computes a product of 16-bit activations. All give the same bits, so the choice is one of speed
// alone, and every constant of it is here.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastserve::cuda {

// What a block of a kernel computes.
struct GemmGeometry {
  const char* name;
  int rows, columns;
  bool split;                                        // a block for each part of the inputs, which meet in the workspace
  enum class Way { kRows, kTiles, kWarpgroup } way;  // gemm_rows.cuh, gemm_tiles.cuh, gemm_warpgroup.cuh
  // Copies in flight, by the bytes of a weight: 16 bits, 8, 4.
  int stages[3];
};
enum class GemmKernel {
  kRows8,
  kRows16,
  kSplit32,
  kSplit64,
  kSplit128,
  kWide64,
  kLarge128,
  kWarpgroup128,
  kWarpgroup192
};
constexpr int kGemmKernels = 9;
// Of gemm_warpgroup.cuh: blocks of a cluster, and rows of a block. Its geometry is a cluster's.
constexpr int kWarpgroupBlocks = 2, kWarpgroupRows = 128;
constexpr GemmGeometry kGemmGeometries[kGemmKernels] = {
    {"rows8", 8, 16, false, GemmGeometry::Way::kRows, {6, 8, 12}},
    {"rows16", 16, 32, false, GemmGeometry::Way::kRows, {4, 6, 7}},
    {"split32", 32, 128, true, GemmGeometry::Way::kTiles, {4, 5, 6}},
    {"split64", 64, 128, true, GemmGeometry::Way::kTiles, {4, 5, 6}},
    {"split128", 128, 128, true, GemmGeometry::Way::kTiles, {3, 4, 4}},
    {"wide64", 64, 256, false, GemmGeometry::Way::kTiles, {3, 4, 5}},
    {"large128", 128, 128, false, GemmGeometry::Way::kTiles, {3, 4, 4}},
    // Weights of 16 bits only.
    {"warpgroup128", kWarpgroupBlocks * kWarpgroupRows, 128, false, GemmGeometry::Way::kWarpgroup, {6, 0, 0}},
    {"warpgroup192", kWarpgroupBlocks * kWarpgroupRows, 192, false, GemmGeometry::Way::kWarpgroup, {5, 0, 0}}};

constexpr const GemmGeometry& geometry(GemmKernel kernel) { return kGemmGeometries[static_cast<int>(kernel)]; }

constexpr int stages_of(GemmKernel kernel, WeightFormat format) {
  const bool nibbles = format == WeightFormat::kQ4_0 || format == WeightFormat::kQ4_1;
  return geometry(kernel).stages[nibbles ? 2 : is_quantized(format) ? 1 : 0];
}

// A workspace begins with a counter for each tile of the output, all zero between products; then come the parts.
constexpr int64_t kGemmCounterBytes = 16 * 1024;

struct GemmShape {
  int64_t m, n, k_padded;
  WeightFormat format;
};

struct GemmDevice {
  int processors;           // multiprocessors
  int64_t shared_bytes;     // that a block may ask for
  bool warpgroups = false;  // whether gemm_warpgroup.cuh is known to work there (warpgroup_trial.h)
};

// Tiles of the output; what a split kernel needs of the workspace; what a block needs of shared memory.
int64_t gemm_tiles(GemmKernel kernel, const GemmShape& shape);
int64_t gemm_workspace_needed(GemmKernel kernel, const GemmShape& shape);
int64_t gemm_shared_bytes(GemmKernel kernel, WeightFormat format);

// False where the device or the workspace is too small.
bool can_run(GemmKernel kernel, const GemmShape& shape, const GemmDevice& device, int64_t workspace_bytes);
// Modelled microseconds.
double gemm_cost(GemmKernel kernel, const GemmShape& shape, const GemmDevice& device);
// The cheapest that can run.
GemmKernel choose_gemm(const GemmShape& shape, const GemmDevice& device, int64_t workspace_bytes);

}  // namespace fastserve::cuda
