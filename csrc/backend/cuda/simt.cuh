// What kernels are written in besides CUDA C++ itself: element types, matrix instructions, asynchronous copies,
// launches. All that a kernel needs of the machine and that is not plain C++ is here or one of the CUDA intrinsics
// named below, so that tests/simt/ can put its emulation in this file's place and run the same sources on a CPU.
//
// Kernels may use: threadIdx, blockIdx, blockDim, gridDim (x, y, z); __syncthreads, __syncthreads_or, __syncwarp;
// __shfl_sync, __shfl_xor_sync, __shfl_up_sync, __shfl_down_sync, __ballot_sync, __any_sync, __all_sync; atomicAdd,
// atomicMax, atomicMin, atomicOr, atomicCAS on 32-bit and 64-bit integers (never on floats: their order is nobody's);
// __threadfence; __popc, __ffs, __clz, __byte_perm; min, max; fmaf, fminf, fmaxf, sqrtf, rsqrtf, expf, exp2f,
// tanhf, erff, sinf, cosf, __float_as_uint, __uint_as_float. Shared memory is shared_memory<T>(), nothing else. nvcc
// contracts nothing (-fmad=false): where a multiply and an add become one rounding, the source says fmaf.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/early_launch.h"
#include "backend/cuda/runtime_api.h"
#include "backend/cuda/shared_limits.h"
#include "common/dtype.h"

namespace fastserve::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- elements: float, Bf16, Half. Sums are float32 everywhere.

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

// Round to nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 narrow<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two 16-bit elements in one register, `low` in the lower half, as matrix instructions want them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// ---- shared memory: the block's dynamic one, 128-byte aligned, as large as the launch says

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char fastserve_shared[];
  return reinterpret_cast<T*>(fastserve_shared);
}

// ---- matrix instructions of a whole warp (PTX ISA, "Matrix fragments for mma.m16n8k16"). With g = lane / 4, t = lane
// % 4:
//   a[0] = A[g][2t, 2t+1]      a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]      b[1] = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t, 2t+1]          d[2], d[3] = D[g+8][2t, 2t+1]

// d += A [16, 16] · B [16, 8], float32 sums.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 × 8 matrices of 16-bit elements from shared memory. Lane i gives the address of row i % 8 of matrix i /
// 8 (16 bytes, aligned); r[m] is row g, columns 2t and 2t + 1, of matrix m; transposed: rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- asynchronous copies from global to shared memory, 16 bytes each, both ends aligned

// Without `valid` the 16 bytes become zero and `from` is not read (but must be a pointer into some allocation).
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// The same, of memory that no kernel writes: it may come before wait_for_predecessor().
__device__ __forceinline__ void copy_constant_async(void* to, const void* from) { copy_async(to, from); }
// Closes this thread's group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kOpen` of this thread's groups, the latest, are not done. Other threads see them after a
// barrier.
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// ---- other instructions

// Writes 16 bytes of global memory at once; aligned. For where nvcc would part an ordinary store of a vector, as it
// does if it is one of two ways to write the same place.
__device__ __forceinline__ void store_vector(void* to, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// 2^x, within 2 units in the last place; subnormal results are zero; 2^-infinity is zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x, within 1 unit in the last place, where x and the result are normal.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- kernels that begin before the one before them on their stream has ended (LaunchConfig::early)

// The first thing that every thread of such a kernel does: lets the next kernel begin as early.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What every thread of such a kernel does: waits until the kernel before has ended and what it has written is there.
// Then nothing is different from a launch in order; but the blocks are there by now. Before it a thread may write
// shared memory and have what no kernel writes copied there (copy_constant_async), and nothing else: what the kernel
// before reads or writes is not to be touched, other threads are not to be waited for.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Both, where there is nothing to do meanwhile.
__device__ __forceinline__ void begin_after_predecessor() {
  let_next_begin();
  wait_for_predecessor();
}

// ---- launches, from the host

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
  unsigned cluster = 1;  // neighbouring blocks, by x, that run together (hopper.cuh); divides the grid
  bool early = false;    // the kernel calls wait_for_predecessor(), and begins early where devices can (early_launch.h)
};

// Runs kernel(arguments…), which are copied. Throws when the launch is refused.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, config.shared_bytes);
  [&](Parameters... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))..., nullptr};
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (config.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = config.cluster;
      attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
      ++count;
    }
    if (config.early && kernels_begin_early()) {
      prefer_shared_memory(function);
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count].val.programmaticStreamSerializationAllowed = 1;
      ++count;
    }
    cudaLaunchConfig_t launched{};
    launched.gridDim = config.grid;
    launched.blockDim = config.block;
    launched.dynamicSmemBytes = config.shared_bytes;
    launched.stream = config.stream;
    launched.attrs = attributes;
    launched.numAttrs = count;
    check(cudaLaunchKernelExC(&launched, function, pointers));
  }(static_cast<Arguments&&>(arguments)...);
}

}  // namespace fastserve::cuda
