#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "model/philox.h"

namespace fastserve {

namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct Candidate {
  int32_t token;
  float logit;
  double weight;  // e^(logit - max)
};

bool ahead(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

int32_t argmax(std::span<const float> logits) {
  int32_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    FS_CHECK(!std::isnan(logits[i]), "the model produced a logit that is not a number");
    if (logits[i] > logits[best]) best = static_cast<int32_t>(i);
  }
  return best;
}

void adjust(std::span<float> logits, const SamplingParams& params, const TokenCounts& counts, int64_t output_index) {
  const auto vocab = static_cast<int32_t>(logits.size());
  for (const auto& [token, bias] : params.bias) {
    if (token >= 0 && token < vocab) logits[token] += bias;
  }
  if (output_index < params.min_tokens) {
    for (const int32_t token : params.stop_tokens) {
      if (token >= 0 && token < vocab) logits[token] = kMasked;
    }
  }
  if (!params.needs_history()) return;
  for (const auto& [token, count] : counts.counts) {
    float& logit = logits[token];
    if (params.repetition_penalty != 1.0f) {
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    }
    logit -= params.frequency_penalty * static_cast<float>(count.outputs);
    if (count.outputs > 0) logit -= params.presence_penalty;
  }
}

// The tokens that survive min-p, top-k and top-p, with their weights. Sorted, best first, when top-p or top-k asked
// for an order; else by token id.
std::vector<Candidate> candidates(std::span<const float> logits, const SamplingParams& params) {
  const float maximum = logits[argmax(logits)];
  FS_CHECK(maximum > kMasked, "every token is masked: logit_bias or min_tokens leaves nothing to choose");
  const bool limit_k = params.top_k > 0 && params.top_k < static_cast<int64_t>(logits.size());
  const double inverse = 1.0 / static_cast<double>(params.temperature);
  const double threshold = params.min_p > 0 ? std::log(static_cast<double>(params.min_p)) : -HUGE_VAL;

  std::vector<Candidate> kept;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double exponent = (static_cast<double>(logits[i]) - static_cast<double>(maximum)) * inverse;
    // Below e^-60 a token cannot be drawn with 53 random bits.
    if (exponent < -60.0 || exponent < threshold) continue;
    kept.push_back({static_cast<int32_t>(i), logits[i], exponent});
  }
  if (limit_k && params.top_k < static_cast<int64_t>(kept.size())) {
    std::nth_element(kept.begin(), kept.begin() + params.top_k - 1, kept.end(), ahead);
    const float last = kept[params.top_k - 1].logit;  // its equals stay, as in transformers and vLLM
    std::erase_if(kept, [&](const Candidate& c) { return c.logit < last; });
  }
  double total = 0;
  for (Candidate& c : kept) total += c.weight = std::exp(c.weight);
  if (limit_k || params.top_p < 1.0f) std::sort(kept.begin(), kept.end(), ahead);
  if (params.top_p < 1.0f) {
    double reached = 0;
    size_t count = 0;
    while (count < kept.size() && reached < static_cast<double>(params.top_p) * total) reached += kept[count++].weight;
    kept.resize(std::max<size_t>(1, count));
  }
  return kept;
}

float log_sum_exp(std::span<const float> logits) {
  const float maximum = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit - maximum));
  return maximum + static_cast<float>(std::log(total));
}

int32_t draw(const std::vector<Candidate>& kept, const SamplingParams& params, int64_t output_index) {
  double total = 0;
  for (const Candidate& c : kept) total += c.weight;
  const double target = uniform(params.seed, static_cast<uint64_t>(output_index)) * total;
  double reached = 0;
  for (const Candidate& c : kept) {
    reached += c.weight;
    if (target < reached) return c.token;
  }
  return kept.back().token;
}

}  // namespace

Sampled sample(std::span<float> logits, const SamplingParams& params, const TokenCounts& counts, int64_t output_index) {
  Sampled result{.token = 0, .logprob = std::numeric_limits<float>::quiet_NaN(), .top = {}, .error = {}};
  std::vector<float> original;
  float normalizer = 0;
  if (params.logprobs >= 0) {
    original.assign(logits.begin(), logits.end());
    normalizer = log_sum_exp(logits);
  }
  adjust(logits, params, counts, output_index);
  if (params.temperature == 0.0f) {
    result.token = argmax(logits);
    FS_CHECK(logits[result.token] > kMasked,
             "every token is masked: logit_bias or min_tokens leaves nothing to choose");
  } else {
    result.token = draw(candidates(logits, params), params, output_index);
  }
  if (params.logprobs >= 0) {
    result.logprob = original[result.token] - normalizer;
    std::vector<int32_t> order(original.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    const auto count = std::min<size_t>(params.logprobs, order.size());
    std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
      return original[a] != original[b] ? original[a] > original[b] : a < b;
    });
    for (size_t i = 0; i < count; ++i) result.top.emplace_back(order[i], original[order[i]] - normalizer);
  }
  return result;
}

std::vector<float> distribution(std::span<float> logits, const SamplingParams& params, const TokenCounts& counts,
                                int64_t output_index) {
  adjust(logits, params, counts, output_index);
  std::vector<float> probabilities(logits.size(), 0.0f);
  if (params.temperature == 0.0f) {
    probabilities[argmax(logits)] = 1.0f;
    return probabilities;
  }
  const auto kept = candidates(logits, params);
  double total = 0;
  for (const Candidate& c : kept) total += c.weight;
  for (const Candidate& c : kept) probabilities[c.token] = static_cast<float>(c.weight / total);
  return probabilities;
}

}  // namespace fastserve
