// Kernels that only test the emulation: right ones, and ones with a mistake planted that it must find.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace fastserve::cuda {

void example_add(DType dtype, const void* a, const void* b, void* c, int64_t count, cudaStream_t stream);

}  // namespace fastserve::cuda
