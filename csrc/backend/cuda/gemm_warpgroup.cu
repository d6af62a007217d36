// Launches of products by warpgroups. Its own file, because it is compiled for other architectures than the rest: 9.0's
// own instructions are machine code for that device alone, and all others get a kernel without a body.
#include "backend/cuda/gemm_warpgroup.cuh"

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/tensor_map.h"

namespace fastserve::cuda {

namespace {

template <class T, GemmKernel kKernel>
void launch_warpgroups(const GemmCall& call, int processors, cudaStream_t stream) {
  constexpr const GemmGeometry& g = geometry(kKernel);
  constexpr int kStages = g.stages[0];
  using Kernel = WarpgroupKernel<T, g.columns, kStages>;
  static_assert(Kernel::kBlocks * Kernel::kRows == g.rows);
  const DeviceMatrix& weight = call.weight;
  const WarpgroupCall given{
      tensor_map(call.dtype, call.input, {call.m, weight.k_padded, call.ld_input}, {Kernel::kRows, kSlab}),
      tensor_map(call.dtype, weight.data, {weight.n, weight.k_padded, weight.k_padded},
                 {g.columns / Kernel::kBlocks, kSlab}),
      call};
  const int64_t tiles = ceil_div(call.m, g.rows) * ceil_div(weight.n, g.columns), room = processors / Kernel::kBlocks;
  const int64_t clusters = tiles < room ? tiles : room > 0 ? room : 1;
  launch(gemm_warpgroup_kernel<T, g.columns, kStages>,
         {dim3(static_cast<unsigned>(clusters * Kernel::kBlocks)), dim3(Kernel::kThreads), Kernel::kSharedBytes, stream,
          Kernel::kBlocks},
         given);
}

}  // namespace

void gemm_warpgroup(const GemmCall& call, GemmKernel kernel, int processors, cudaStream_t stream) {
  const bool wide = kernel == GemmKernel::kWarpgroup192;
  if (call.dtype == DType::kBFloat16) {
    (wide ? launch_warpgroups<Bf16, GemmKernel::kWarpgroup192>
          : launch_warpgroups<Bf16, GemmKernel::kWarpgroup128>)(call, processors, stream);
  } else {
    (wide ? launch_warpgroups<Half, GemmKernel::kWarpgroup192>
          : launch_warpgroups<Half, GemmKernel::kWarpgroup128>)(call, processors, stream);
  }
}

}  // namespace fastserve::cuda
