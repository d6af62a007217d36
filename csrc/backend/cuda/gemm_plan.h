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
  bool split;   // a block for each part of the inputs, which meet in the workspace
  bool stream;  // gemm_rows.cuh, else gemm_tiles.cuh
  // Copies in flight, by the bytes of a weight: 16 bits, 8, 4.
  int stages[3];
};
enum class GemmKernel { kRows8, kRows16, kSplit32, kSplit64, kSplit128, kWide64, kLarge128 };
constexpr int kGemmKernels = 7;
constexpr GemmGeometry kGemmGeometries[kGemmKernels] = {
    {"rows8", 8, 16, false, true, {6, 8, 12}},      {"rows16", 16, 32, false, true, {4, 6, 7}},
    {"split32", 32, 128, true, false, {4, 5, 6}},   {"split64", 64, 128, true, false, {4, 5, 6}},
    {"split128", 128, 128, true, false, {3, 4, 4}}, {"wide64", 64, 256, false, false, {3, 4, 5}},
    {"large128", 128, 128, false, false, {3, 4, 4}}};

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
  int processors;        // multiprocessors
  int64_t shared_bytes;  // that a block may ask for
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
