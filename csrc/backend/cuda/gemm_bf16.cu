#include "backend/cuda/gemm_tensor.cuh"

namespace fastserve::cuda {

void gemm_bf16(const GemmCall& call, GemmKernel kernel, cudaStream_t stream) {
  run_tensor<Bf16, WeightFormat::kBFloat16>(call, kernel, stream);
}

}  // namespace fastserve::cuda
