#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/check.h"
#include "model/logit_row.h"
#include "model/philox.h"

namespace fastserve {

namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

bool adjusts(const SamplingParams& params, int64_t output_index) {
  return !params.bias.empty() || output_index < params.min_tokens || params.needs_history();
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

void check_choice(const LogitRow& row) { FS_CHECK(row.maximum() > kMasked, kNothingToChooseMessage); }

// What tokens are drawn by: min-p, top-k and top-p each raise the smallest logit that stays.
Weighting choose(LogitRow& row, const SamplingParams& params) {
  check_choice(row);
  const double maximum = static_cast<double>(row.maximum()), temperature = static_cast<double>(params.temperature);
  constexpr double kMaxScale =
      std::numeric_limits<float>::max();  // an infinite one would make the maximum's weight NaN
  // Below e^-60 a token cannot be drawn with 53 random bits.
  const double lowest = params.min_p > 0 ? std::max(-60.0, std::log(static_cast<double>(params.min_p))) : -60.0;
  Weighting weighting{.maximum = row.maximum(),
                      .scale = static_cast<float>(std::min(1.0 / temperature, kMaxScale)),
                      .cut = ceil_float(maximum + temperature * std::min(0.0, lowest))};
  // Equals of the last stay, as in transformers and vLLM.
  if (params.top_k > 0 && params.top_k < row.size()) weighting.cut = row.kth(params.top_k, weighting.cut);
  if (params.top_p < 1.0f) {
    const LogitCut cut = row.nucleus(weighting, row.total(weighting), static_cast<double>(params.top_p));
    row.drop_surplus(cut);
    weighting.cut = cut.value;
  }
  return weighting;
}

// Takes log-probabilities from logits as the model gave them.
class LogProbabilities {
 public:
  explicit LogProbabilities(const LogitRow& row)
      : normalizer_(static_cast<double>(row.maximum()) +
                    std::log(row.total({.maximum = row.maximum(),
                                        .scale = 1.0f,
                                        .cut = ceil_float(static_cast<double>(row.maximum()) - 60.0)}))) {}

  float of(float logit) const { return static_cast<float>(static_cast<double>(logit) - normalizer_); }

  std::vector<std::pair<int32_t, float>> top(const LogitRow& row, std::span<const float> logits, int32_t wanted) const {
    const int64_t count = std::min<int64_t>(wanted, row.size());
    if (count == 0) return {};
    auto tokens = row.at_least(row.kth(count, kMasked));
    std::partial_sort(tokens.begin(), tokens.begin() + count, tokens.end(),
                      [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    std::vector<std::pair<int32_t, float>> result;
    for (int64_t i = 0; i < count; ++i) result.emplace_back(tokens[i], of(logits[tokens[i]]));
    return result;
  }

 private:
  double normalizer_;
};

}  // namespace

Sampled sample(const LogitKernels& kernels, std::span<float> logits, const SamplingParams& params,
               const TokenCounts& counts, int64_t output_index) {
  Sampled result{.token = 0, .logprob = std::numeric_limits<float>::quiet_NaN(), .top = {}, .error = {}};
  std::optional<LogitRow> row;
  std::optional<LogProbabilities> logprobs;
  std::vector<float> original;
  const bool adjusted = adjusts(params, output_index);
  if (params.logprobs >= 0) {
    row.emplace(kernels, logits);
    logprobs.emplace(*row);
    result.top = logprobs->top(*row, logits, params.logprobs);
    if (adjusted) original.assign(logits.begin(), logits.end());
  }
  if (adjusted) adjust(logits, params, counts, output_index);
  if (adjusted || !row) row.emplace(kernels, logits);
  if (params.temperature == 0.0f) {
    check_choice(*row);
    result.token = row->argmax();
  } else {
    result.token = row->draw(choose(*row, params), uniform(params.seed, static_cast<uint64_t>(output_index)));
  }
  if (logprobs) result.logprob = logprobs->of(adjusted ? original[result.token] : logits[result.token]);
  return result;
}

std::vector<float> distribution(const LogitKernels& kernels, std::span<float> logits, const SamplingParams& params,
                                const TokenCounts& counts, int64_t output_index) {
  adjust(logits, params, counts, output_index);
  LogitRow row(kernels, logits);
  std::vector<float> probabilities(logits.size(), 0.0f);
  if (params.temperature == 0.0f) {
    probabilities[row.argmax()] = 1.0f;
    return probabilities;
  }
  const Weighting weighting = choose(row, params);
  const double total = row.total(weighting);
  row.weigh(weighting, probabilities.data());
  for (float& p : probabilities) p = static_cast<float>(static_cast<double>(p) / total);
  return probabilities;
}

}  // namespace fastserve
