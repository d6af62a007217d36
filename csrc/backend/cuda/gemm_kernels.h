// The products behind gemm(), by the type of the activations. Arguments have been checked.
#pragma once

#include "backend/cuda/gemm_plan.h"
#include "backend/cuda/kernels.h"

namespace fastserve::cuda {

void gemm_f32(const GemmCall& call, cudaStream_t stream);
void gemm_bf16(const GemmCall& call, GemmKernel kernel, cudaStream_t stream);
void gemm_f16(const GemmCall& call, GemmKernel kernel, cudaStream_t stream);

// What gemm() takes for a call of 16-bit activations, whether or not kernels of warpgroups are admitted.
GemmKernel gemm_kernel(const GemmCall& call, bool warpgroups);

// By one of the kernels of warpgroups, on so many multiprocessors at most.
void gemm_warpgroup(const GemmCall& call, GemmKernel kernel, int processors, cudaStream_t stream);

// gemm() with a kernel of the caller's choice, which must be able to run; float32 has only one. Of `processors`
// multiprocessors, 0: all, where the kernel goes by their number.
void gemm_with(GemmKernel kernel, const GemmCall& call, cudaStream_t stream, int processors = 0);

// Makes the columns [first_column, first_column + columns) of a product of 16-bit activations, or what they make if it
// is gated, of their sums [m, ld_sums]: bias, accumulation, rounding as in gemm(). The columns begin at a multiple of
// 8; not for int8.
void finish_product(const GemmCall& call, const float* sums, int64_t ld_sums, int64_t first_column, int64_t columns,
                    cudaStream_t stream);

}  // namespace fastserve::cuda
