// Sums of 64-bit integers in shared memory, by bin.
#pragma once

#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

// As two words with a carry: shared memory adds 32 bits in one instruction, but 64 only in a loop of exchanges.
template <int kSize>
class Histogram {
 public:
  // By all threads of the block; a barrier has to follow.
  __device__ __forceinline__ void clear() {
    for (int b = static_cast<int>(threadIdx.x); b < kSize; b += static_cast<int>(blockDim.x)) low_[b] = high_[b] = 0;
  }
  __device__ __forceinline__ void add(int bin, uint64_t value) {
    const auto low = static_cast<uint32_t>(value);
    const uint32_t before = low != 0 ? atomicAdd(&low_[bin], low) : 0;
    const uint32_t high = static_cast<uint32_t>(value >> 32) + (before + low < low ? 1 : 0);
    if (high != 0) atomicAdd(&high_[bin], high);
  }
  // After a barrier.
  __device__ __forceinline__ uint64_t at(int bin) const { return static_cast<uint64_t>(high_[bin]) << 32 | low_[bin]; }

 private:
  uint32_t low_[kSize], high_[kSize];
};

}  // namespace fastserve::cuda
