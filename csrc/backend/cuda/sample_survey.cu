// The first look at the logits: log-probabilities' sums and alternatives, biases and masks, the best token.
#include "backend/cuda/sample.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kBlockGroups = 4;

// Of numbers: bits that say whether they all are, and finite above.
__device__ __forceinline__ uint32_t flags_of(const float (&x)[kPerLane], uint32_t not_a_number, uint32_t infinite) {
  uint32_t flags = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (x[i] != x[i]) flags |= not_a_number;
    if (x[i] == INFINITY) flags |= infinite;
  }
  return warp_reduce(flags, Union{});
}

// The `wanted` best tokens of a group, in descending order; 0 where the vocabulary ends before.
__device__ __forceinline__ void find_tops(const float (&x)[kPerLane], int group, int vocab, int wanted,
                                          uint64_t* tops) {
  uint64_t last = ~uint64_t{0};
  for (int n = 0; n < wanted; ++n) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int token = RowLogits::token(group, i);
      const uint64_t rank = token < vocab ? rank_of(x[i], token) : 0;
      if (rank < last) best = Maximum{}(best, rank);
    }
    last = warp_reduce(best, Maximum{});
    if (threadIdx.x % kWarp == 0) tops[n] = last;
  }
}

// Grid: (groups / kBlockGroups, rows); one warp a group.
__global__ void __launch_bounds__(kBlockGroups* kWarp) survey_kernel(SampleArguments arguments) {
  const SampleCall& call = arguments.call;
  const SampleWorkspace& work = arguments.work;
  const int64_t index = blockIdx.y;
  const SampleRow row = call.rows[index];
  if (row.logits < 0) return;
  const int vocab = static_cast<int>(call.vocab), thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.x) * kBlockGroups + thread / kWarp;
  const bool exists = group < work.groups;
  GroupStats stats{.best = 0, .raw_max = 0.0f, .raw_sum = 0.0f, .flags = 0};
  float x[kPerLane];

  if (truncates(row, call.vocab)) {
    const int step = static_cast<int>(gridDim.x * blockDim.x);
    for (int b = static_cast<int>(blockIdx.x) * kBlockGroups * kWarp + thread; b < kBins; b += step) {
      work.bin_mass[index * kBins + b] = 0;
      work.bin_count[index * kBins + b] = 0;
    }
  }
  if (row.logprobs >= 0 && exists) {
    RowLogits(call, row, false).load_group(x, group);
    stats.flags = flags_of(x, kRawNotANumber, kRawInfinite);
    float maximum = x[0], sum = 0.0f;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) maximum = fmaxf(maximum, x[i]);
    maximum = warp_reduce(maximum, Maximum{});
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (x[i] > -INFINITY) sum += expf(x[i] - maximum);
    }
    stats.raw_max = maximum;
    stats.raw_sum = warp_reduce(sum, Sum{});
    find_tops(x, group, vocab, row.logprobs, work.tops + (index * work.groups + group) * kMaxTop);
  }

  if (row.biases + row.stops > 0) {  // a block changes the tokens that it reads
    float* logits = call.logits + row.logits * call.ld;
    const int first = static_cast<int>(blockIdx.x) * kBlockGroups * kTokenGroup;
    const int end = first + kBlockGroups * kTokenGroup < vocab ? first + kBlockGroups * kTokenGroup : vocab;
    __syncthreads();
    for (int i = thread; i < row.biases; i += static_cast<int>(blockDim.x)) {
      const SampleBias bias = call.biases[row.bias + i];
      if (bias.token < first || bias.token >= end) continue;
      work.unbiased[row.bias + i] = logits[bias.token];
      logits[bias.token] += bias.bias;
    }
    __syncthreads();
    for (int i = thread; i < row.stops; i += static_cast<int>(blockDim.x)) {
      const int token = call.stop_tokens[row.stop + i];
      if (token >= first && token < end) logits[token] = -INFINITY;
    }
    __syncthreads();
  }

  if (!exists) return;
  if (row.logprobs < 0 || row.biases + row.stops > 0 || row.counts != nullptr) {
    RowLogits(call, row, true).load_group(x, group);
  }
  stats.flags |= flags_of(x, kNotANumber, kInfinite);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) stats.best = Maximum{}(stats.best, rank_of(x[i], RowLogits::token(group, i)));
  stats.best = warp_reduce(stats.best, Maximum{});
  if (thread % kWarp == 0) work.stats[index * work.groups + group] = stats;
}

}  // namespace

void survey(const SampleArguments& arguments, cudaStream_t stream) {
  launch(survey_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(arguments.work.groups, kBlockGroups)),
                       static_cast<unsigned>(arguments.call.num_rows)),
          .block = dim3(kBlockGroups * kWarp),
          .shared_bytes = 0,
          .stream = stream},
         arguments);
}

}  // namespace fastserve::cuda
