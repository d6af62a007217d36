// What the host calls to sample, and the tables of past tokens.
#include "backend/cuda/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cuda/sample.cuh"
#include "backend/logits.h"

namespace fastserve::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    count_kernel(uint32_t* counts, int64_t vocab, const int32_t* tokens, int64_t count, bool prompt) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count || tokens[i] < 0 || tokens[i] >= vocab) return;
  if (prompt) {
    atomicOr(&counts[tokens[i]], kInPrompt);
  } else {
    atomicAdd(&counts[tokens[i]], 1u);
  }
}

void launch_count(uint32_t* counts, int64_t vocab, const int32_t* tokens, int64_t count, bool prompt,
                  cudaStream_t stream) {
  if (count == 0) return;
  launch(count_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(count, kThreads))),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .stream = stream},
         counts, vocab, tokens, count, prompt);
}

}  // namespace

SampleWorkspace::SampleWorkspace(void* base, int64_t rows, int64_t vocab, int64_t biases)
    : bytes(0), groups(static_cast<int>(ceil_div(vocab, kTokenGroup))) {
  const auto place = [&]<class T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(static_cast<char*>(base) + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 128);
  };
  place(stats, rows * groups);
  place(masses, rows * groups);
  place(tops, rows * groups * kMaxTop);
  place(bin_mass, rows * kBins);
  place(bin_count, rows * kBins);
  place(unbiased, biases);
}

int64_t sample_workspace(int64_t rows, int64_t vocab, int64_t biases) {
  return SampleWorkspace(nullptr, rows, vocab, biases).bytes;
}

const char* describe(SampleError error) {
  switch (error) {
    case SampleError::kNone:
      return "";
    case SampleError::kNotANumber:
      return kNotANumberMessage;
    case SampleError::kInfinite:
      return kInfiniteMessage;
    case SampleError::kNothingToChoose:
      return kNothingToChooseMessage;
  }
  return "";
}

void SampleRow::set_temperature(float temperature, float min_p) {
  if (temperature == 0.0f) {
    scale = 0.0f;
    reach = 0.0;
    return;
  }
  // An infinite scale would make the maximum's weight NaN.
  constexpr double kMaxScale = std::numeric_limits<float>::max();
  scale = static_cast<float>(std::min(1.0 / static_cast<double>(temperature), kMaxScale));
  // Below e^-60 a token cannot be drawn with 53 random bits.
  const double lowest = min_p > 0 ? std::max(-60.0, std::log(static_cast<double>(min_p))) : -60.0;
  reach = static_cast<double>(temperature) * std::min(0.0, lowest);
}

void sample(const SampleCall& call, cudaStream_t stream) {
  FS_CHECK(call.vocab >= 1 && call.vocab <= kMaxVocab, "a vocabulary of ", call.vocab, " tokens: it must have 1 to ",
           kMaxVocab);
  if (call.num_rows == 0) return;
  const SampleArguments arguments{call, {call.workspace, call.num_rows, call.vocab, 0}};
  survey(arguments, stream);
  if (call.draws) weigh(arguments, stream);
  choose(arguments, stream);
}

int64_t count_table_size(int64_t vocab) { return round_up(vocab, kPad); }

void count_tokens(uint32_t* counts, int64_t vocab, const int32_t* prompt, int64_t prompt_tokens, const int32_t* outputs,
                  int64_t output_tokens, cudaStream_t stream) {
  check(cudaMemsetAsync(counts, 0, static_cast<size_t>(count_table_size(vocab)) * sizeof(uint32_t), stream));
  launch_count(counts, vocab, prompt, prompt_tokens, true, stream);
  launch_count(counts, vocab, outputs, output_tokens, false, stream);
}

}  // namespace fastserve::cuda
