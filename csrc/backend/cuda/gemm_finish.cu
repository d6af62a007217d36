// The end of products whose sums another library made.
#include "backend/cuda/gemm_epilogue.cuh"
#include "backend/cuda/gemm_kernels.h"

namespace fastserve::cuda {

namespace {

constexpr int kThreads = 128;

// A thread has 8 columns of a row. Grid: (rows, columns / (8 · kThreads)): there may be more rows than a grid is high.
template <class T>
__global__ void finish_product_kernel(GemmCall call, const float* sums, int64_t ld_sums, int64_t first_column,
                                      int64_t columns) {
  const int64_t at = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * 8;
  if (at >= columns) return;
  const auto* from = reinterpret_cast<const float4*>(sums + static_cast<int64_t>(blockIdx.x) * ld_sums + at);
  const float4 low = from[0], high = from[1];
  float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (call.gated) {
    put_pairs<T, false>(call, blockIdx.x, first_column + at, x, Eight());
  } else {
    put_eight<T, false>(call, blockIdx.x, first_column + at, x);
  }
}

}  // namespace

void finish_product(const GemmCall& call, const float* sums, int64_t ld_sums, int64_t first_column, int64_t columns,
                    cudaStream_t stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>(call.m), static_cast<unsigned>(ceil_div(columns, 8 * kThreads))),
                            dim3(kThreads), 0, stream};
  const auto kernel = call.dtype == DType::kBFloat16 ? finish_product_kernel<Bf16> : finish_product_kernel<Half>;
  launch(kernel, config, call, sums, ld_sums, first_column, columns);
}

}  // namespace fastserve::cuda
