// Tokens and log-probabilities from what the kernels before have found. A block takes one row.
#include "backend/cuda/sample.cuh"
#include "backend/cuda/sample_draw.cuh"

namespace fastserve::cuda {

namespace {

// The logarithm of the sum of e^logit.
__device__ __forceinline__ double normalizer(SelectScratch& scratch, const GroupStats* stats, int groups,
                                             float maximum) {
  uint64_t sum = 0;
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += kSelectThreads) {
    // A group's sum is at most kTokenGroup.
    sum += static_cast<uint64_t>(expf(stats[g].raw_max - maximum) * stats[g].raw_sum *
                                 static_cast<float>(1.0 / kWeightUnit));
  }
  sum = block_reduce(sum, uint64_t{0}, Sum{}, scratch.sums);
  return static_cast<double>(maximum) + log(static_cast<double>(sum) * kWeightUnit);
}

// The logit as it came: a bias may have been added since.
__device__ __forceinline__ float raw_logit(const SampleArguments& arguments, const SampleRow& row, int token,
                                           SelectScratch& scratch) {
  uint64_t unbiased = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.biases; i += kSelectThreads) {
    if (arguments.call.biases[row.bias + i].token == token) {
      unbiased = uint64_t{1} << 32 | __float_as_uint(arguments.work.unbiased[row.bias + i]);
    }
  }
  unbiased = block_reduce(unbiased, uint64_t{0}, Maximum{}, scratch.sums);
  if (unbiased != 0) return __uint_as_float(static_cast<uint32_t>(unbiased));
  return arguments.call.logits[row.logits * arguments.call.ld + token];
}

// The best of the row are among the best of its groups.
__device__ __forceinline__ void report_tops(const SampleArguments& arguments, int64_t index, int wanted,
                                            double normalizer, SelectScratch& scratch) {
  const int groups = arguments.work.groups;
  const uint64_t* tops = arguments.work.tops + index * groups * kMaxTop;
  TopToken* result = arguments.call.tops + index * kMaxTop;
  uint64_t last = ~uint64_t{0};
  for (int n = 0; n < kMaxTop; ++n) {
    uint64_t best = 0;
    for (int i = static_cast<int>(threadIdx.x); n < wanted && i < groups * wanted; i += kSelectThreads) {
      const uint64_t rank = tops[i / wanted * kMaxTop + i % wanted];
      if (rank < last) best = Maximum{}(best, rank);
    }
    if (n < wanted) last = best = block_reduce(best, uint64_t{0}, Maximum{}, scratch.sums);
    if (threadIdx.x != 0) continue;
    if (best == 0) {
      result[n] = {-1, NAN};
    } else {
      result[n] = {token_of(best), static_cast<float>(static_cast<double>(logit_of(best)) - normalizer)};
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads) choose_kernel(SampleArguments arguments) {
  auto& scratch = *shared_memory<DrawScratch>();
  const SampleCall& call = arguments.call;
  const int64_t index = blockIdx.x;
  const SampleRow row = call.rows[index];
  if (row.logits < 0) return;
  const int groups = arguments.work.groups;
  const GroupStats* stats = arguments.work.stats + index * groups;
  const Summary summary = summarize(stats, groups, scratch.select.sums);
  SampleResult result{.token = -1, .logprob = NAN, .error = summary.error};
  if (summary.error == SampleError::kNone) {
    result.token =
        row.scale == 0.0f ? token_of(summary.best) : draw(scratch, arguments, row, index, logit_of(summary.best));
    if (row.logprobs >= 0) {
      const double sum = normalizer(scratch.select, stats, groups, summary.raw_max);
      result.logprob =
          static_cast<float>(static_cast<double>(raw_logit(arguments, row, result.token, scratch.select)) - sum);
      report_tops(arguments, index, row.logprobs, sum, scratch.select);
    }
  }
  if (threadIdx.x != 0) return;
  call.results[index] = result;
  // An iteration that is queued already may refer to a token that could not be sampled. Any will do, since the job
  // ends.
  if (row.slot >= 0) call.last_sampled[row.slot] = result.token >= 0 ? result.token : 0;
  if (row.counts != nullptr && result.token >= 0) row.counts[result.token] += 1;
}

}  // namespace

void choose(const SampleArguments& arguments, cudaStream_t stream) {
  launch(choose_kernel,
         {.grid = dim3(static_cast<unsigned>(arguments.call.num_rows)),
          .block = dim3(kSelectThreads),
          .shared_bytes = sizeof(DrawScratch),
          .stream = stream},
         arguments);
}

}  // namespace fastserve::cuda
