// What a device must offer to sample: passes over logits, from which model/logit_row.cc makes everything else.
#pragma once

#include <cstdint>

namespace fastserve {

// A pass takes at most this many logits, so that sums of that many weights, which are float32, stay accurate.
constexpr int64_t kLogitBlock = 512;
// Floats that collect() may write beyond those it keeps.
constexpr int64_t kLogitSlack = 16;

// Why a row of logits gives no token.
constexpr const char* kNotANumberMessage = "the model produced a logit that is not a number";
constexpr const char* kInfiniteMessage = "the model produced an infinite logit";
constexpr const char* kNothingToChooseMessage =
    "every token is masked: logit_bias or min_tokens leaves nothing to choose";

// The weight of a logit: e^((logit - maximum) · scale), or 0 when it is below `cut`, which is finite.
struct Weighting {
  float maximum;
  float scale;
  float cut;
};

// Each function's arithmetic has one fixed order, which depends on nothing but n.
struct LogitKernels {
  // NaN when one of them is; n > 0.
  float (*maximum)(const float* logits, int64_t n);
  float (*sum)(const float* logits, int64_t n, const Weighting& weighting);
  void (*weigh)(const float* logits, int64_t n, const Weighting& weighting, float* weights);
  // Copies those in [low, high), keeping their order, and returns how many; `kept` may be `logits` itself.
  int64_t (*collect)(const float* logits, int64_t n, float low, float high, float* kept);
};

}  // namespace fastserve
