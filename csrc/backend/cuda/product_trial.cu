#include "backend/cuda/product_trial.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;

__global__ void mark_differences_kernel(const uint32_t* a, const uint32_t* b, int64_t words, uint32_t* flag) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words; i += step) {
    if (a[i] != b[i]) atomicOr(flag, 1u);
  }
}

}  // namespace

void mark_differences(const uint32_t* a, const uint32_t* b, int64_t words, uint32_t* flag, cudaStream_t stream) {
  const int64_t blocks = ceil_div(words, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
  launch(mark_differences_kernel, {grid, dim3(kThreads), 0, stream}, a, b, words, flag);
}

}  // namespace fastserve::cuda
