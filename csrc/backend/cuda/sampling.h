// Sampling on the device, with the semantics of model/sampler.h: what the host fills in, calls and reads back.
//
// All parameters lie in device memory at addresses that the host chooses once, so that the calls can be captured in a
// graph and replayed with other rows. Nothing is sorted: what is kept is found by radix selection. Weights are counted
// in units of kWeightUnit as integers, so that their sums are the same bits in every order: a weight loses less than
// one unit, and all of kMaxVocab of them less than 1e-6 of the total, which is at least 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastserve::cuda {

constexpr int kMaxTop = 20;              // alternatives reported for one token
constexpr int64_t kMaxVocab = 1 << 20;   // tokens
constexpr double kWeightUnit = 0x1p-40;  // of what the largest logit weighs

// Why a row has no token. The host says it in the words of describe().
enum class SampleError : int32_t { kNone, kNotANumber, kInfinite, kNothingToChoose };
const char* describe(SampleError error);

struct SampleBias {
  int32_t token;  // ignored where it is not in the vocabulary
  float bias;
};

// One row of an iteration.
struct SampleRow {
  int32_t logits = -1;       // row of logits; -1: this one only fills a graph's batch up, and has no result
  int32_t slot = -1;         // whose last sampled token the result becomes; -1: nobody's
  int64_t output_index = 0;  // outputs of the job before this one
  uint64_t seed = 0;
  float scale = 0;    // of differences of logits: weighting()
  int32_t top_k = 0;  // <= 0: all
  double reach = 0;   // how far below the maximum a logit may lie: weighting()
  float top_p = 1.0f;
  int32_t logprobs = -1;         // alternatives to report, at most kMaxTop; -1: not even the chosen token's
  int32_t bias = 0, biases = 0;  // index of the first and number; no token twice in a row
  int32_t stop = 0, stops = 0;   // tokens that are masked: none once min_tokens are out
  float repetition_penalty = 1.0f;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  uint32_t* counts = nullptr;  // count_tokens() of the slot, to which the sampled token is added; null: no penalties

  // min_p: share of the largest weight that others need. A temperature of 0 is greedy.
  void set_temperature(float temperature, float min_p);
};

struct SampleResult {
  int32_t token;  // -1 where there is an error
  float logprob;  // NaN where not asked for
  SampleError error;
};

struct TopToken {
  int32_t token;  // -1 beyond what was asked for, or the vocabulary
  float logprob;
};

struct SampleCall {
  // Known to the host:
  int64_t num_rows;
  int64_t vocab, ld;  // ld: a multiple of kPad
  bool draws;         // false: every row is greedy
  // In device memory:
  float* logits;               // [rows, ld]; biases and masks are added in place
  const SampleRow* rows;       // [num_rows]
  const SampleBias* biases;    // of all rows
  const int32_t* stop_tokens;  // likewise
  int32_t* last_sampled;       // [slots]
  SampleResult* results;       // [num_rows]
  TopToken* tops;              // [num_rows, kMaxTop], most likely first, ties by token
  void* workspace;             // sample_workspace() bytes
};
void sample(const SampleCall& call, cudaStream_t stream);

// Bytes that so many rows, with so many biases among all of them, may need.
int64_t sample_workspace(int64_t rows, int64_t vocab, int64_t biases);

// How often each token occurred: bit 31 is set of tokens in the prompt, the others count the outputs.
constexpr uint32_t kInPrompt = 1u << 31;
// Elements of such a table.
int64_t count_table_size(int64_t vocab);
// Fills a table. Tokens outside of the vocabulary are ignored.
void count_tokens(uint32_t* counts, int64_t vocab, const int32_t* prompt, int64_t prompt_tokens, const int32_t* outputs,
                  int64_t output_tokens, cudaStream_t stream);

}  // namespace fastserve::cuda
