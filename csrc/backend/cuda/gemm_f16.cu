#include "backend/cuda/gemm_tensor.cuh"

namespace fastserve::cuda {

void gemm_f16(const GemmCall& call, GemmKernel kernel, cudaStream_t stream) {
  run_tensor<Half, WeightFormat::kFloat16>(call, kernel, stream);
}

}  // namespace fastserve::cuda
