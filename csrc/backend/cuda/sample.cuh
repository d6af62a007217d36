// What the kernels of sampling share: how a row of logits is read, ordered and weighed, and where they leave what the
// next one needs.
#pragma once

#include <cfloat>

#include "backend/backend.h"
#include "backend/cuda/reduce.cuh"
#include "backend/cuda/sampling.h"
#include "backend/cuda/vector.cuh"

namespace fastserve::cuda {

constexpr int kTokenGroup = 512;               // tokens that a warp takes at once
constexpr int kPerLane = kTokenGroup / kWarp;  // which are in steps of four
constexpr int kBins = 1024;                    // of a row's logits, by their distance from the maximum

// Of one group of one row.
struct GroupStats {
  uint64_t best;  // rank() of the best token, as the sampler is to see it
  float raw_max;  // of the logits as they came, where log-probabilities are wanted
  float raw_sum;  // of e^(logit - raw_max)
  uint32_t flags;
};
// flags:
constexpr uint32_t kRawNotANumber = 1, kRawInfinite = 2, kNotANumber = 4, kInfinite = 8;

// Where kernels leave what the next one needs.
struct SampleWorkspace {
  SampleWorkspace(void* base, int64_t rows, int64_t vocab, int64_t biases);
  int64_t bytes;

  int groups;                    // of a row
  GroupStats* stats;             // [rows, groups]
  uint64_t* masses;              // [rows, groups]: weights of rows that only draw
  uint64_t* tops;                // [rows, groups, kMaxTop]: rank() of each group's best by the raw logits, or 0
  unsigned long long* bin_mass;  // [rows, kBins]
  uint32_t* bin_count;           // [rows, kBins]
  float* unbiased;               // [biases]: logits before their bias
};

struct SampleArguments {
  SampleCall call;
  SampleWorkspace work;
};

// The kernels, in their order. survey: the best token of each group, and what log-probabilities need; adds biases.
void survey(const SampleArguments& arguments, cudaStream_t stream);
// weigh: weights of each group, or the histogram of rows that cut by top-k or top-p.
void weigh(const SampleArguments& arguments, cudaStream_t stream);
// choose: tokens and log-probabilities.
void choose(const SampleArguments& arguments, cudaStream_t stream);

// Increases with the number; -0 is 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// Larger for larger logits, and for lower ids among equals. Never 0.
__device__ __forceinline__ uint64_t rank_of(float logit, int token) {
  return static_cast<uint64_t>(ordered(logit)) << 32 | ~static_cast<uint32_t>(token);
}
__device__ __forceinline__ int token_of(uint64_t rank) { return static_cast<int>(~static_cast<uint32_t>(rank)); }
__device__ __forceinline__ float logit_of(uint64_t rank) { return unordered(static_cast<uint32_t>(rank >> 32)); }

// A row's logits with the penalties applied as they are read.
class RowLogits {
 public:
  __device__ __forceinline__ RowLogits(const SampleCall& call, const SampleRow& row, bool penalized)
      : logits_(call.logits + row.logits * call.ld),
        counts_(penalized ? row.counts : nullptr),
        repetition_(row.repetition_penalty),
        presence_(row.presence_penalty),
        frequency_(row.frequency_penalty),
        vocab_(static_cast<int>(call.vocab)) {}

  // The id of element i of this lane's share of a group.
  static __device__ __forceinline__ int token(int group, int i) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    return group * kTokenGroup + (i / 4 * kWarp + lane) * 4 + i % 4;
  }

  // -infinity beyond the vocabulary.
  __device__ __forceinline__ void load_group(float (&x)[kPerLane], int group) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const int first = token(group, i);
      float part[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (first < vocab_) load(part, logits_ + first);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = first + j < vocab_ ? part[j] : -INFINITY;
    }
    if (counts_ == nullptr) return;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const int first = token(group, i);
      if (first >= vocab_) continue;
      const auto counts = *reinterpret_cast<const uint4*>(counts_ + first);
      x[i] = penalized(x[i], counts.x);
      x[i + 1] = penalized(x[i + 1], counts.y);
      x[i + 2] = penalized(x[i + 2], counts.z);
      x[i + 3] = penalized(x[i + 3], counts.w);
    }
  }

  __device__ __forceinline__ float at(int token) const {
    return counts_ == nullptr ? logits_[token] : penalized(logits_[token], counts_[token]);
  }

 private:
  __device__ __forceinline__ float penalized(float logit, uint32_t count) const {
    if (count == 0) return logit;
    if (repetition_ != 1.0f) logit = logit > 0 ? logit / repetition_ : logit * repetition_;
    const uint32_t outputs = count & ~kInPrompt;
    logit -= frequency_ * static_cast<float>(outputs);
    if (outputs > 0) logit -= presence_;
    return logit;
  }

  const float* logits_;
  const uint32_t* counts_;
  float repetition_, presence_, frequency_;
  int vocab_;
};

// What is known of a row when all of its groups have been surveyed.
struct Summary {
  uint64_t best;
  float raw_max;
  SampleError error;
};
// For all threads of the block. `scratch`: shared memory for kWarp values.
__device__ __forceinline__ Summary summarize(const GroupStats* stats, int groups, uint64_t* scratch) {
  uint64_t best = 0, raw = 0;
  uint32_t flags = 0;
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x)) {
    best = Maximum{}(best, stats[g].best);
    raw = Maximum{}(raw, static_cast<uint64_t>(ordered(stats[g].raw_max)));
    flags |= stats[g].flags;
  }
  best = block_reduce(best, uint64_t{0}, Maximum{}, scratch);
  // One reduction for both: the flags are few.
  raw = block_reduce(raw, uint64_t{0}, Maximum{}, scratch);
  flags = static_cast<uint32_t>(block_reduce(static_cast<uint64_t>(flags), uint64_t{0}, Union{}, scratch));
  SampleError error = SampleError::kNone;
  if ((flags & kRawNotANumber) != 0) {
    error = SampleError::kNotANumber;
  } else if ((flags & kRawInfinite) != 0) {
    error = SampleError::kInfinite;
  } else if ((flags & kNotANumber) != 0) {
    error = SampleError::kNotANumber;
  } else if ((flags & kInfinite) != 0) {
    error = SampleError::kInfinite;
  } else if (logit_of(best) == -INFINITY) {
    error = SampleError::kNothingToChoose;
  }
  return {best, unordered(static_cast<uint32_t>(raw)), error};
}

// What the logits of a row that is drawn from weigh.
class Weights {
 public:
  __device__ __forceinline__ Weights(const SampleRow& row, float maximum)
      : maximum_(maximum), scale_(row.scale), cut_(ceil_float(static_cast<double>(maximum) + row.reach)) {
    bins_per_unit_ = static_cast<float>(kBins) / (maximum_ - cut_);
  }

  __device__ __forceinline__ float maximum() const { return maximum_; }
  __device__ __forceinline__ float cut() const { return cut_; }  // what is below weighs nothing

  // In units of kWeightUnit; of a logit that is not below the cut.
  __device__ __forceinline__ uint64_t of(float logit) const {
    return static_cast<uint64_t>(expf((logit - maximum_) * scale_) * static_cast<float>(1.0 / kWeightUnit));
  }
  // Lower logits are in the same bin or a higher one.
  __device__ __forceinline__ int bin_of(float logit) const {
    return static_cast<int>(fminf((maximum_ - logit) * bins_per_unit_, static_cast<float>(kBins - 1)));
  }
  // Ascends from 0, the maximum's, as logits descend.
  __device__ __forceinline__ uint32_t depth_of(float logit) const { return ordered(maximum_) - ordered(logit); }
  __device__ __forceinline__ float at_depth(uint32_t depth) const { return unordered(ordered(maximum_) - depth); }
  // Of all depths down to the cut's.
  __device__ __forceinline__ int depth_bits() const { return kWarp - __clz(static_cast<int>(depth_of(cut_))); }

 private:
  // The smallest float that is not below x; finite.
  static __device__ __forceinline__ float ceil_float(double x) {
    x = x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
    const auto rounded = static_cast<float>(x);
    return static_cast<double>(rounded) < x ? unordered(ordered(rounded) + 1) : rounded;
  }

  float maximum_, scale_, cut_, bins_per_unit_;
};

__device__ __forceinline__ bool truncates(const SampleRow& row, int64_t vocab) {
  return (row.top_k > 0 && row.top_k < vocab) || row.top_p < 1.0f;
}

}  // namespace fastserve::cuda
