// What kernels may ask for of a block's shared memory.
#pragma once

#include <cstddef>

namespace fastserve::cuda {

// To be called before a launch with so many bytes. More than every kernel may have are asked for once for each kernel
// and device: launches are many, and the driver takes a while.
void allow_shared_memory(const void* kernel, size_t bytes);

}  // namespace fastserve::cuda
