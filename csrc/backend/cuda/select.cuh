// Selection without a sort: of weighted candidates with integer keys, the key at which the weights' running sum exceeds
// a target. A block looks for it digit by digit, through histograms.
#pragma once

#include "backend/cuda/histogram.cuh"
#include "backend/cuda/reduce.cuh"

namespace fastserve::cuda {

constexpr int kSelectThreads = 512;  // of a block that selects
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

struct Selected {
  uint32_t key;
  uint64_t below;  // weight of all smaller keys
};

struct SelectScratch {
  uint64_t sums[kWarp];
  Selected found;
  Histogram<kDigits> digits;
};

// The first of kSize values, value_of(i), at which their running sum exceeds `target`, which all of them together do.
// For all threads of the block; value_of may read what was written before the last barrier.
template <int kSize, class Value>
__device__ __forceinline__ Selected find_exceeding(SelectScratch& scratch, uint64_t target, Value value_of) {
  constexpr int kEach = (kSize + kSelectThreads - 1) / kSelectThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  uint64_t values[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    values[i] = thread * kEach + i < kSize ? value_of(thread * kEach + i) : 0;
    sum += values[i];
  }
  uint64_t upto = sum;  // the sum of this warp's lanes up to this one
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == kWarp - 1) scratch.sums[warp] = upto;
  __syncthreads();
  uint64_t before = lane < warp ? scratch.sums[lane] : 0;  // of the warps before this one: there are at most kWarp
  before = warp_reduce(before, Sum{}) + upto - sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before <= target && target < before + values[i]) {
      scratch.found = {static_cast<uint32_t>(thread * kEach + i), before};
    }
    before += values[i];
  }
  __syncthreads();
  return scratch.found;  // which is written again behind the next call's first barrier only
}

// The smallest key, of `bits` bits, at which the running sum of weights by ascending key exceeds `target`, which is
// less than the sum of all. each(visit) calls visit(key, weight) for this thread's candidates, always the same ones.
template <class Each>
__device__ __forceinline__ Selected select(SelectScratch& scratch, int bits, uint64_t target, Each each) {
  Selected result{0, 0};  // the key's upper digits, and the weight below it
  for (int undecided = bits; undecided > 0;) {
    const int shift = undecided > kDigitBits ? undecided - kDigitBits : 0;
    scratch.digits.clear();
    __syncthreads();
    each([&](uint32_t key, uint64_t weight) {
      if (static_cast<uint64_t>(key) >> undecided != result.key) return;
      scratch.digits.add(static_cast<int>((key >> shift) & ((1u << (undecided - shift)) - 1)), weight);
    });
    __syncthreads();
    const Selected digit =
        find_exceeding<kDigits>(scratch, target - result.below, [&](int d) { return scratch.digits.at(d); });
    result = {result.key << (undecided - shift) | digit.key, result.below + digit.below};
    undecided = shift;
  }
  return result;
}

}  // namespace fastserve::cuda
