// Sampling where each rank of a stage has the logits of a part of the vocabulary: whole rows go to one rank each, which
// samples them as it would alone, and then all ranks know all tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/communicator.h"
#include "common/buffer.h"
#include "model/sampler.h"
#include "model/shard.h"

namespace fastserve {

class SharedSampling {
 public:
  // All ranks of the stage take part, here and in everything else.
  SharedSampling(Communicator& ranks, const Shard& shard, int64_t vocab_size);

  // Whether sample number `index` of a batch is this rank's.
  bool mine(int64_t index) const { return index % ranks_.size() == ranks_.rank(); }
  // Sends samples' logits to the ranks that they are of. `local` [rows, shard.num_tokens], stride ld; `rows` are those
  // that are sampled. Returns [own samples, vocab_size], stride ld_rows(), valid until the next call.
  float* exchange(const float* local, int64_t ld, std::span<const int64_t> rows);
  int64_t ld_rows() const { return round_up(vocab_size_, kPad); }
  // Own samples are set; then all are.
  void gather(std::vector<Sampled>& samples);
  // All of `count` rows, [count, vocab_size].
  std::vector<float> gather_logits(const float* local, int64_t ld, int64_t count);

 private:
  Communicator& ranks_;
  const int64_t vocab_size_;
  std::vector<int64_t> first_tokens_, num_tokens_;  // of each rank
  Buffer rows_;
};

// Samples in a flat buffer, and back. Throws for a damaged one.
std::vector<std::byte> encode_samples(std::span<const Sampled> samples);
std::vector<Sampled> decode_samples(std::span<const std::byte> buffer);

}  // namespace fastserve
