// Chooses the tokens of a batch from its logits, wherever those are, and remembers what penalties look at.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/sampler.h"

namespace fastserve {

struct SampleRequest {
  int64_t row;  // of the logits
  int32_t slot;
  int64_t output_index;  // counts the job's outputs before this one
};

class TokenSampler {
 public:
  virtual ~TokenSampler() = default;

  // Takes what memory of the device it needs to sample batches of so many, and no more from then on.
  virtual void reserve(int64_t most) = 0;

  // A slot's parameters, and where these look at it its history. Opening a slot again replaces both.
  virtual void open(int32_t slot, const SamplingParams& params, std::span<const int32_t> prompt,
                    std::span<const int32_t> outputs) = 0;
  virtual void close(int32_t slot) = 0;

  // Begins to choose one token a request from `logits` [rows, vocab], stride ld, which are modified; slots' histories
  // grow by them.
  virtual void sample(float* logits, int64_t ld, std::span<const SampleRequest> requests) = 0;
  // What the oldest sample() not yet taken has come to, in the order of its requests; waits for it. A token that could
  // not be chosen is -1, with the reason.
  virtual std::vector<Sampled> take() = 0;
  // Forgets one that was not taken and will not be, since its batch has failed: the latest, or the oldest.
  virtual void drop_latest() = 0;
  virtual void drop_oldest() = 0;
  // What stands in a batch for the token that a slot is about to get from a sample() not yet taken.
  virtual int32_t last_of(int32_t slot) const = 0;
  // A slot's history grows by a token that was chosen elsewhere.
  virtual void note(int32_t slot, int32_t token) = 0;
};

}  // namespace fastserve
