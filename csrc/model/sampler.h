// Turns logits into tokens, one row at a time and each row by itself.
//
// Order, as in vLLM: log-probabilities are taken from the logits as they come; then logit bias and the min_tokens
// mask, penalties, temperature, min-p, top-k, top-p, and one draw, which walks the tokens by id. Weights are float32,
// their sums float64 over blocks: probabilities are within 1e-6 of exact ones.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/logits.h"

namespace fastserve {

struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  int32_t top_k = 0;         // <= 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t logprobs = -1;  // alternatives to report; -1: none, not even the chosen token's
  int32_t min_tokens = 0;
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, float>> bias;
  std::vector<int32_t> stop_tokens;  // masked while fewer than min_tokens are out

  bool needs_history() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
};

// How often each token occurred: what penalties look at.
struct TokenCounts {
  struct Count {
    bool in_prompt = false;
    int32_t outputs = 0;
  };
  std::unordered_map<int32_t, Count> counts;

  void add_prompt(int32_t token) { counts[token].in_prompt = true; }
  void add_output(int32_t token) { ++counts[token].outputs; }
};

struct Sampled {
  int32_t token;
  float logprob;                               // of the token; NaN when not asked for
  std::vector<std::pair<int32_t, float>> top;  // most likely first, ties by token id
  std::string error;                           // why there is no token, which is -1 then
};

// `logits` [vocab] is modified. output_index counts the job's outputs before this one. Equal candidates are ranked by
// token id. Throws when the logits hold a NaN or +infinity or nothing can be chosen.
Sampled sample(const LogitKernels& kernels, std::span<float> logits, const SamplingParams& params,
               const TokenCounts& counts, int64_t output_index);

// The distribution `sample` draws from: probabilities [vocab], zero outside the kept set; for greedy, one token.
std::vector<float> distribution(const LogitKernels& kernels, std::span<float> logits, const SamplingParams& params,
                                const TokenCounts& counts, int64_t output_index);

}  // namespace fastserve
