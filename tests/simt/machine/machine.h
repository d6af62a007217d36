// One CUDA machine, as a kernel sees it: blocks of threads, barriers, warp collectives, shared memory, asynchronous
// copies. Blocks, or clusters of them, run one after the other. Within one every thread runs until it must wait for
// others, in an order that is shuffled anew each time, so that a result which rests on an order that no barrier made
// comes out different.
//
// What would be undefined on a GPU is an Error that names kernel, block and thread. One kernel runs at a time in a
// process: the caller sees to that.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <sstream>
#include <string>

namespace simt {

using Site = std::source_location;

constexpr int kLanes = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of a block, in bytes (compute capability 9.0)

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  unsigned cluster;  // neighbouring blocks, by x, that run together and reach each other's shared memory
  bool early;        // the kernel may begin before the one before it has ended
  Site where;        // in the source of the host; names the kernel in messages
  bool (*is_device_memory)(const void*, size_t) = nullptr;  // whether all these bytes are in one allocation
};

std::string short_path(const std::string& path);  // from the repository's root
std::string describe(const Site& site);

// Calls body() once for every thread of the grid. Throws when the kernel does what a GPU leaves undefined.
void run(const Launch& launch, const std::function<void()>& body, uint64_t seed);

// ---- for the kernel's thread that runs now

// Ends the kernel with an Error.
[[noreturn]] void fault(const std::string& what);

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

int lane();  // in its warp

// Waits until all lanes of the mask have come to the same call; the last of them does resolve(payloads by lane, mask).
using Resolve = void (*)(void* const (&payloads)[kLanes], unsigned mask);
void meet(const char* operation, unsigned mask, const Site& site, void* payload, Resolve resolve);

// Waits for all threads of the block; whether the predicate of any was true.
bool block_barrier(const char* operation, const Site& site, bool predicate);

// Waits for all threads of the blocks of the cluster.
void cluster_barrier(const Site& site);
unsigned cluster_rank();  // of the thread's block

// The first thing that a thread of a kernel that begins early has to do, and what it has to do before it touches what
// other kernels do, or waits for other threads. (Here all is over by then that came before.)
void let_next_begin();
void wait_for_predecessor();

unsigned char* shared_memory();

// Faults unless the bytes lie in the block's shared memory or in an allocation of the device, respectively, and
// aligned.
void check_shared(const char* operation, const void* address, size_t bytes, size_t alignment);
void check_global(const char* operation, const void* address, size_t bytes, size_t alignment);

// Asynchronous copies of 16 bytes. The target is poison from here on; the bytes arrive when they are waited for.
void begin_copy(void* to, const void* from, bool valid);
void begin_constant_copy(void* to, const void* from);  // of what no kernel writes
void commit_copies();
void wait_copies(int open);

}  // namespace simt

// What every thread finds of itself.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
