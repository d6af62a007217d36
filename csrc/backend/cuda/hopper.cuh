// What kernels of compute capability 9.0 may use besides simt.cuh: clusters of blocks, barriers in shared memory,
// copies of whole tiles, products of warpgroups. tests/simt/ has its own in this file's place too. Compiled for sm_90a.
#pragma once

#include <cuda.h>

#include "backend/cuda/matrix_descriptor.h"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

constexpr int kWarpgroup = 4 * kWarp;  // the first of its warps has a number that is a multiple of 4

// Where a kernel has its body: other architectures' code has none, and the host does not launch it there.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FS_HOPPER 1
#else
#define FS_HOPPER 0
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- clusters

__device__ __forceinline__ unsigned cluster_rank() {  // of the block
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Waits for all threads of the cluster.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- barriers in shared memory: a phase is over when so many threads have arrived and all bytes that are expected are
// there; then the next one begins. Phases have parities 0, 1, 0, …

using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After a thread has made barriers, before the cluster_barrier() behind which copies and other blocks use them.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// At the barrier in the same place of another block of the cluster, or the own one. Says that the warp has read; what
// it has written other blocks do not see by that, which would take a fence of the whole device.
__device__ __forceinline__ void arrive_at(Barrier* barrier, unsigned rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Time in 2^32 nanoseconds, 4.3 seconds. (The copying thread's 24 registers have no room for more of it.)
__device__ __forceinline__ unsigned coarse_time() {
  unsigned now;
  asm volatile("mov.u32 %0, %%globaltimer_hi;" : "=r"(now));
  return now;
}
// Waits until the phase of this parity is over that is the present one, or the one before it. Traps after some 10
// seconds, so that a mistake, or a device that does not do as we think, shows as an error and not as a standstill.
// Polls are no measure of that: each may sleep for as long as the device likes.
__device__ __forceinline__ void wait_barrier(Barrier* barrier, int parity) {
  constexpr unsigned kMostTime = 2;
  const uint32_t address = shared_address(barrier);
  const auto is_over = [&] {
    uint32_t over;
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
    return over != 0;
  };
  if (is_over()) return;
  const unsigned begin = coarse_time();
  while (!is_over()) {
    if (coarse_time() - begin > kMostTime) __trap();
  }
}

// ---- copies of tiles from global to shared memory, of what a tensor map describes

// The map's box of elements from (column, row) on; zeros where there is no element. To a multiple of 128 bytes, of 8
// rows' bytes if the map swizzles. All its bytes count at the barrier when they are there.
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap* map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same to the same place in each of the cluster's blocks whose bit is set, with the barrier in the same place
// there.
__device__ __forceinline__ void copy_tile_to(unsigned blocks, void* to, const CUtensorMap* map, int column, int row,
                                             Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// ---- registers: of a thread, from here on; all warps of a warpgroup, and the sum must be there

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup (PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16"). With w the warp of the
// group, g = lane / 4, t = lane % 4:
//   d[4 c], d[4 c + 1] = D[16 w + g][8 c + 2 t, + 1]        d[4 c + 2], d[4 c + 3] = D[16 w + g + 8][8 c + 2 t, + 1]

// Before sums that threads have written are given to a product, and behind wait_products() before they are read: the
// compiler must not move accesses across.
template <int kSums>
__device__ __forceinline__ void keep_sums(float (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int kSums>
__device__ __forceinline__ void fence_sums(float (&d)[kSums]) {
  keep_sums(d);
  fence_products();
}
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kOpen` of the groups of products that were committed, the latest, are not done.
template <int kOpen>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}
// The same until all are done, and `d` can be read.
template <int kSums>
__device__ __forceinline__ void wait_for_sums(float (&d)[kSums]) {
  wait_products<0>();
  keep_sums(d);
}

// d += A [64, 16] · Bᵀ [kColumns, 16], float32 sums, with A and B in shared memory. Until the product has been waited
// for its sums are nobody's, and A and B must stay; products on the same sums add in order.
template <class T, int kColumns>
__device__ __forceinline__ void multiply_async(float (&d)[kColumns / 2], uint64_t a, uint64_t b);

#define FS_MULTIPLY_ASYNC_128(T, kType)                                                                            \
  template <>                                                                                                      \
  __device__ __forceinline__ void multiply_async<T, 128>(float (&d)[64], uint64_t a, uint64_t b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." kType "." kType                                    \
                 " {"                                                                                              \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                  \
                 "}, %64, %65, 1, 1, 1, 0, 0;"                                                                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
                   "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
                   "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
                   "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),      \
                   "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),      \
                   "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),      \
                   "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),      \
                   "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])       \
                 : "l"(a), "l"(b)                                                                                  \
                 : "memory");                                                                                      \
  }
FS_MULTIPLY_ASYNC_128(Bf16, "bf16")
FS_MULTIPLY_ASYNC_128(Half, "f16")
#undef FS_MULTIPLY_ASYNC_128

#define FS_MULTIPLY_ASYNC_192(T, kType)                                                                               \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply_async<T, 192>(float (&d)[96], uint64_t a, uint64_t b) {                    \
    asm volatile(                                                                                                     \
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." kType "." kType                                                \
        " {"                                                                                                          \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                            \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                            \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                              \
        "}, %96, %97, 1, 1, 1, 0, 0;"                                                                                 \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),     \
          "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),     \
          "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),     \
          "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),     \
          "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])                   \
        : "l"(a), "l"(b)                                                                                              \
        : "memory");                                                                                                  \
  }
FS_MULTIPLY_ASYNC_192(Bf16, "bf16")
FS_MULTIPLY_ASYNC_192(Half, "f16")
#undef FS_MULTIPLY_ASYNC_192

}  // namespace fastserve::cuda
