// The products behind gemm(), by the type of the activations. Arguments have been checked.
#pragma once

#include "backend/cuda/gemm_plan.h"
#include "backend/cuda/kernels.h"

namespace fastserve::cuda {

void gemm_f32(const GemmCall& call, cudaStream_t stream);
void gemm_bf16(const GemmCall& call, GemmKernel kernel, cudaStream_t stream);
void gemm_f16(const GemmCall& call, GemmKernel kernel, cudaStream_t stream);

// gemm() with a kernel of the caller's choice, which must be able to run; float32 has only one.
void gemm_with(GemmKernel kernel, const GemmCall& call, cudaStream_t stream);

}  // namespace fastserve::cuda
