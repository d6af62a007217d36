// Reductions over a warp and over a block, in orders fixed by the number of threads. Every thread gets the result.
#pragma once

#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Union {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a | b;
  }
};

// Of the `lanes` (a power of two) neighbours that begin at a multiple of it.
template <class Combine, class T>
__device__ __forceinline__ T warp_reduce(T x, Combine combine, int lanes = kWarp) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// `scratch`: shared memory for kWarp values. Blocks are one-dimensional, of whole warps.
template <class Combine, class T>
__device__ __forceinline__ T block_reduce(T x, T identity, Combine combine, T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  x = warp_reduce(x, combine);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = warp_reduce(lane < static_cast<int>(blockDim.x) / kWarp ? scratch[lane] : identity, combine);
  __syncthreads();  // the scratch may be written again
  return x;
}

}  // namespace fastserve::cuda
