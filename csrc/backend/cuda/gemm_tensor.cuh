// Launches of the kernels of 16-bit activations; each type's translation unit has its own.
#pragma once

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/gemm_rows.cuh"
#include "backend/cuda/gemm_tiles.cuh"

namespace fastserve::cuda {

template <class Weights, WeightFormat kFormat, GemmKernel kKernel, int kTiles>
void launch_rows(const GemmCall& call, cudaStream_t stream) {
  constexpr const GemmGeometry& g = geometry(kKernel);
  constexpr int kStages = stages_of(kKernel, kFormat);
  static_assert(kTiles * kUnitOutputs == g.columns);
  const dim3 grid(static_cast<unsigned>(ceil_div(call.weight.n, g.columns)),
                  static_cast<unsigned>(ceil_div(call.m, g.rows)));
  launch(gemm_rows_kernel<Weights, g.rows, kTiles, kStages>,
         {grid, dim3(kGemmParts * kWarp), RowsKernel<Weights, g.rows, kTiles, kStages>::kSharedBytes, stream, 1, true},
         call);
}

template <class Weights, WeightFormat kFormat, GemmKernel kKernel, int kWarpRows>
void launch_tiles(const GemmCall& call, cudaStream_t stream) {
  constexpr const GemmGeometry& g = geometry(kKernel);
  constexpr int kStages = stages_of(kKernel, kFormat);
  using Kernel = TilesKernel<Weights, g.rows, g.columns, kWarpRows, kStages, g.split>;
  const dim3 grid(static_cast<unsigned>(ceil_div(call.weight.n, g.columns) * ceil_div(call.m, g.rows)),
                  g.split ? kGemmParts : 1);
  launch(gemm_tiles_kernel<Weights, g.rows, g.columns, kWarpRows, kStages, g.split>,
         {grid, dim3(Kernel::kThreads), Kernel::kSharedBytes, stream, 1, true}, call);
}

template <class Weights, WeightFormat kFormat>
void run_kernel(const GemmCall& call, GemmKernel kernel, cudaStream_t stream) {
  switch (kernel) {
    case GemmKernel::kRows8:
      return launch_rows<Weights, kFormat, GemmKernel::kRows8, 2>(call, stream);
    case GemmKernel::kRows16:
      return launch_rows<Weights, kFormat, GemmKernel::kRows16, 4>(call, stream);
    case GemmKernel::kSplit32:
      return launch_tiles<Weights, kFormat, GemmKernel::kSplit32, 32>(call, stream);
    case GemmKernel::kSplit64:
      return launch_tiles<Weights, kFormat, GemmKernel::kSplit64, 64>(call, stream);
    case GemmKernel::kSplit128:
      return launch_tiles<Weights, kFormat, GemmKernel::kSplit128, 64>(call, stream);
    case GemmKernel::kWide64:
      return launch_tiles<Weights, kFormat, GemmKernel::kWide64, 64>(call, stream);
    case GemmKernel::kLarge128:
      return launch_tiles<Weights, kFormat, GemmKernel::kLarge128, 64>(call, stream);
    case GemmKernel::kWarpgroup128:
    case GemmKernel::kWarpgroup192:
      FS_CHECK(false, "the kernel ", geometry(kernel).name, " is launched elsewhere");
  }
}

template <class T, WeightFormat kOwn>
void run_tensor(const GemmCall& call, GemmKernel kernel, cudaStream_t stream) {
  switch (call.weight.format) {
    case WeightFormat::kInt8:
      return run_kernel<QuantizedWeights<T, WeightFormat::kInt8>, WeightFormat::kInt8>(call, kernel, stream);
    case WeightFormat::kQ8_0:
      return run_kernel<QuantizedWeights<T, WeightFormat::kQ8_0>, WeightFormat::kQ8_0>(call, kernel, stream);
    case WeightFormat::kQ4_0:
      return run_kernel<QuantizedWeights<T, WeightFormat::kQ4_0>, WeightFormat::kQ4_0>(call, kernel, stream);
    case WeightFormat::kQ4_1:
      return run_kernel<QuantizedWeights<T, WeightFormat::kQ4_1>, WeightFormat::kQ4_1>(call, kernel, stream);
    default:
      return run_kernel<PlainWeights<T>, kOwn>(call, kernel, stream);
  }
}

}  // namespace fastserve::cuda
