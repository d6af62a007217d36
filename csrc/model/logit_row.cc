#include "model/logit_row.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "common/check.h"

namespace fastserve {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
// Candidates few enough to be sorted.
constexpr int64_t kFew = 64;
constexpr int64_t kPivotSamples = 15;

double sum(const LogitKernels& kernels, std::span<const float> list, const Weighting& weighting) {
  double total = 0;
  for (size_t i = 0; i < list.size(); i += kLogitBlock) {
    const auto count = std::min<size_t>(kLogitBlock, list.size() - i);
    total += static_cast<double>(kernels.sum(list.data() + i, static_cast<int64_t>(count), weighting));
  }
  return total;
}

// Keeps the logits in [low, high) of a list that lies in a buffer with kLogitSlack behind it.
std::span<float> narrow(const LogitKernels& kernels, std::span<float> list, float low, float high) {
  const auto count = kernels.collect(list.data(), static_cast<int64_t>(list.size()), low, high, list.data());
  return list.first(static_cast<size_t>(count));
}

// About the median.
float pivot_of(std::span<const float> list) {
  std::array<float, kPivotSamples> samples;
  for (size_t i = 0; i < samples.size(); ++i) samples[i] = list[i * list.size() / samples.size()];
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

// The cut of `list` at which the sum of the largest weights reaches `target`; all of it when it never does. A
// quickselect of vector passes: half of what is undecided is decided by each. Takes the list apart; target > 0.
LogitCut find_cut(const LogitKernels& kernels, std::span<float> list, Weighting weighting, double target) {
  double above = 0;  // weight of what is larger than all of the list
  while (static_cast<int64_t>(list.size()) > kFew) {
    const float pivot = pivot_of(list);
    weighting.cut = pivot;
    const double upper = sum(kernels, list, weighting);
    if (above + upper < target) {
      above += upper;
      list = narrow(kernels, list, kLowest, pivot);
      if (list.empty()) return {pivot, 1, 0};
      continue;
    }
    const auto kept = narrow(kernels, list, pivot, kInfinity);
    if (kept.size() < list.size()) {
      list = kept;
      continue;
    }
    // The pivot is the smallest of the list: it is decided by itself, or progress would end at many equals.
    weighting.cut = std::nextafter(pivot, kInfinity);
    const double larger = sum(kernels, list, weighting);
    if (above + larger >= target) {
      list = narrow(kernels, list, weighting.cut, kInfinity);
      continue;
    }
    weighting.cut = pivot;
    const auto equal = std::count(list.begin(), list.end(), pivot);
    const double needed = std::ceil((target - above - larger) / kernels.sum(&pivot, 1, weighting));
    const auto equals = static_cast<int64_t>(std::clamp(needed, 1.0, static_cast<double>(equal)));
    return {pivot, equals, equal - equals};
  }
  std::sort(list.begin(), list.end(), std::greater<>());
  weighting.cut = list.back();
  std::array<float, kFew> weights;
  kernels.weigh(list.data(), static_cast<int64_t>(list.size()), weighting, weights.data());
  size_t last = 0;
  for (above += weights[0]; above < target && last + 1 < list.size();) above += weights[++last];
  const float value = list[last];
  const auto [first, end] = std::equal_range(list.begin(), list.end(), value, std::greater<>());
  const auto equals = list.begin() + static_cast<int64_t>(last) + 1 - first;
  return {value, equals, end - first - equals};
}

}  // namespace

float ceil_float(double x) {
  constexpr double kMax = std::numeric_limits<float>::max();
  const auto rounded = static_cast<float>(std::clamp(x, -kMax, kMax));
  return static_cast<double>(rounded) < x ? std::nextafter(rounded, kInfinity) : rounded;
}

LogitRow::LogitRow(const LogitKernels& kernels, std::span<float> logits)
    : kernels_(kernels), logits_(logits), maxima_((logits.size() + kLogitBlock - 1) / kLogitBlock) {
  FS_CHECK(!logits.empty(), "there are no logits to choose from");
  bool numbers = true;
  maximum_ = -kInfinity;
  for (int64_t b = 0; b < blocks(); ++b) {
    maxima_[b] = kernels_.maximum(block(b).data(), static_cast<int64_t>(block(b).size()));
    numbers &= !std::isnan(maxima_[b]);
    maximum_ = std::max(maximum_, maxima_[b]);
  }
  FS_CHECK(numbers, kNotANumberMessage);
  FS_CHECK(maximum_ < kInfinity, kInfiniteMessage);
}

std::span<float> LogitRow::block(int64_t index) const {
  const auto first = static_cast<size_t>(index * kLogitBlock);
  return logits_.subspan(first, std::min<size_t>(kLogitBlock, logits_.size() - first));
}

int32_t LogitRow::argmax() const {
  const int64_t index = std::find(maxima_.begin(), maxima_.end(), maximum_) - maxima_.begin();
  const auto found = block(index);
  return static_cast<int32_t>(index * kLogitBlock + (std::find(found.begin(), found.end(), maximum_) - found.begin()));
}

// All logits of at least `low`, in memory that is this thread's and good until its next call.
std::span<float> LogitRow::collect(float low) const {
  thread_local std::vector<float> list;
  if (list.size() < logits_.size() + kLogitSlack) list.resize(logits_.size() + kLogitSlack);
  int64_t count = 0;
  for (int64_t b = 0; b < blocks(); ++b) {
    if (maxima_[b] < low) continue;
    count +=
        kernels_.collect(block(b).data(), static_cast<int64_t>(block(b).size()), low, kInfinity, list.data() + count);
  }
  return std::span<float>(list).first(static_cast<size_t>(count));
}

float LogitRow::kth(int64_t k, float floor) const {
  float low = std::max(floor, kLowest);
  if (k <= blocks()) {
    // k blocks whose maxima reach a bound hold k logits that do.
    auto maxima = maxima_;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    low = std::max(low, maxima[k - 1]);
  }
  const auto list = collect(low);
  if (static_cast<int64_t>(list.size()) < k) return floor;
  // Without a scale every weight is 1.
  return find_cut(kernels_, list, {.maximum = 0, .scale = 0, .cut = low}, static_cast<double>(k)).value;
}

std::vector<int32_t> LogitRow::at_least(float low) const {
  std::vector<int32_t> tokens;
  for (int64_t b = 0; b < blocks(); ++b) {
    if (maxima_[b] < low) continue;
    const auto logits = block(b);
    for (size_t i = 0; i < logits.size(); ++i) {
      if (logits[i] >= low) tokens.push_back(static_cast<int32_t>(b * kLogitBlock + static_cast<int64_t>(i)));
    }
  }
  return tokens;
}

double LogitRow::total(const Weighting& weighting) const {
  double total = 0;
  for (int64_t b = 0; b < blocks(); ++b) {
    if (maxima_[b] >= weighting.cut) total += sum(kernels_, block(b), weighting);
  }
  return total;
}

LogitCut LogitRow::nucleus(const Weighting& weighting, double total, double share) const {
  // Weights below (1 - share) · total / n add up to less than what may be left out; the 1 % covers rounding.
  const double negligible = 0.99 * (1 - share) * total / static_cast<double>(logits_.size());
  const double lowest =
      static_cast<double>(weighting.maximum) + std::log(negligible) / static_cast<double>(weighting.scale);
  const float low = std::max(weighting.cut, ceil_float(lowest));
  constexpr double kSome = std::numeric_limits<double>::min();  // at least one token stays
  return find_cut(kernels_, collect(low), weighting, std::max(kSome, share * total));
}

void LogitRow::drop_surplus(const LogitCut& cut) {
  if (cut.surplus == 0) return;
  const auto equal = [&](float logit) { return logit == cut.value; };
  int64_t seen = 0;
  for (float& logit : logits_) {
    if (equal(logit) && ++seen > cut.equals) logit = -kInfinity;
  }
}

int32_t LogitRow::draw(const Weighting& weighting, double uniform) const {
  std::vector<double> sums(maxima_.size(), 0.0);
  double total = 0;
  for (int64_t b = 0; b < blocks(); ++b) {
    if (maxima_[b] >= weighting.cut) total += sums[b] = sum(kernels_, block(b), weighting);
  }
  const double target = uniform * total;
  double reached = 0;
  int64_t chosen = 0;
  for (int64_t b = 0; b < blocks(); ++b) {
    if (sums[b] == 0) continue;
    chosen = b;
    if (target < reached + sums[b]) break;
    reached += sums[b];
  }
  std::array<float, kLogitBlock> weights;
  const auto logits = block(chosen);
  kernels_.weigh(logits.data(), static_cast<int64_t>(logits.size()), weighting, weights.data());
  // Added one by one, weights may fall short of their block's sum by a rounding: then it is the last of them.
  size_t token = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (weights[i] == 0) continue;
    token = i;
    reached += static_cast<double>(weights[i]);
    if (target < reached) break;
  }
  return static_cast<int32_t>(chosen * kLogitBlock + static_cast<int64_t>(token));
}

void LogitRow::weigh(const Weighting& weighting, float* weights) const {
  for (int64_t b = 0; b < blocks(); ++b) {
    kernels_.weigh(block(b).data(), static_cast<int64_t>(block(b).size()), weighting, weights + b * kLogitBlock);
  }
}

}  // namespace fastserve
