// One row of logits and what a sampler asks of it: maxima, sums, the k-th largest, a nucleus, a draw. Nothing is sorted
// but a few dozen candidates: what is kept is said by the smallest logit that is.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/logits.h"

namespace fastserve {

// Of the logits of some set, those above `value` and the first `equals`, by token id, of those equal to it.
struct LogitCut {
  float value;
  int64_t equals;
  int64_t surplus;  // more of those equal to it than that
};

// The smallest float that is not below x; finite.
float ceil_float(double x);

class LogitRow {
 public:
  // Throws when a logit is NaN or +infinity: the model went wrong.
  LogitRow(const LogitKernels& kernels, std::span<float> logits);

  int64_t size() const { return static_cast<int64_t>(logits_.size()); }
  float maximum() const { return maximum_; }
  // The token of the largest logit, the first of equals.
  int32_t argmax() const;
  // The k-th largest logit, or `floor` when fewer than k are at least that.
  float kth(int64_t k, float floor) const;
  // Tokens whose logit is at least `low`, by id.
  std::vector<int32_t> at_least(float low) const;

  // Sum of all weights.
  double total(const Weighting& weighting) const;
  // The smallest set of the largest weights that reaches `share` of `total`, which is that of the weighting.
  LogitCut nucleus(const Weighting& weighting, double total, double share) const;
  // Masks the logits that `cut` leaves out although they equal its value.
  void drop_surplus(const LogitCut& cut);
  // The first token, by id, at which the running sum of the weights exceeds `uniform` of their total.
  int32_t draw(const Weighting& weighting, double uniform) const;
  void weigh(const Weighting& weighting, float* weights) const;

 private:
  int64_t blocks() const { return static_cast<int64_t>(maxima_.size()); }
  std::span<float> block(int64_t index) const;
  std::span<float> collect(float low) const;

  const LogitKernels& kernels_;
  const std::span<float> logits_;
  std::vector<float> maxima_;  // of each block of kLogitBlock logits
  float maximum_;
};

}  // namespace fastserve
