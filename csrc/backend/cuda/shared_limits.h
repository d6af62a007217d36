// What kernels may ask for of a block's shared memory.
#pragma once

#include <cstddef>

namespace fastserve::cuda {

// To be called before a launch with so many bytes. More than every kernel may have are asked for once for each kernel
// and device: launches are many, and the driver takes a while.
void allow_shared_memory(const void* kernel, size_t bytes);

// To be called before a launch that may begin before the one before it has ended. Multiprocessors divide the same
// memory into cache and shared memory, and do that anew only when they are idle: a kernel that would want it divided
// otherwise than the one before would have to wait for its end after all. So all of them prefer as much shared memory
// as there is. A hint, given once for each kernel and device.
void prefer_shared_memory(const void* kernel);

}  // namespace fastserve::cuda
