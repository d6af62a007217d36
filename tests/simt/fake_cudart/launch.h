// How emulated kernels get onto a stream of the fake runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>

#include "machine/machine.h"

namespace fake_cudart {

// Queues the kernel `function`; `body` runs one thread of it. `arguments` is what it was called with: allocations that
// pointers in there lead to count as used until the kernel is done.
void launch(const void* function, const simt::Launch& launch, std::function<void()> body, const void* arguments,
            size_t bytes, cudaStream_t stream);

// What the calling host thread's next launch reads and writes, so that races of the kernel with copies are found too.
void next_launch_reads(const void* memory, size_t bytes);
void next_launch_writes(const void* memory, size_t bytes);

}  // namespace fake_cudart
