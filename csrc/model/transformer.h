// One decoder for every family, written once over Backend.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "comm/communicator.h"
#include "comm/sender.h"
#include "common/buffer.h"
#include "model/shard.h"
#include "model/spec.h"
#include "model/weights.h"

namespace fastserve {

// The ranks that hold the other parts of a model. Null: there are none.
struct Neighbours {
  Communicator* tensor = nullptr;    // of this stage, by the part of its matrices that they hold
  Communicator* receives = nullptr;  // of the pipeline, by stage: from the stage before comes the residual, ...
  Communicator* sends = nullptr;     // ... and to the next one it goes; over another one, which a thread has to itself
};

class Transformer {
 public:
  // max_tokens: the most tokens of one batch. `failed` is called on another thread, once, when the next stage cannot be
  // sent what forward() had for it.
  Transformer(const ModelSpec& spec, const Shard& shard, const Weights& weights, Backend& backend, int64_t max_tokens,
              const Neighbours& neighbours, std::function<void(std::exception_ptr)> failed);

  // Runs a ragged batch. rows: the jobs' tokens, back to back; token_ids and positions: [tokens]; logit_tokens: batch
  // indices of the tokens whose logits are wanted. Returns logits [logit_tokens, shard.num_tokens], row stride
  // ld_logits(), valid until the next call; null where this is not the last stage, and the next one gets the residual
  // while this one goes on. All ranks take part.
  float* forward(std::span<const Row> rows, std::span<const int32_t> token_ids, std::span<const int32_t> positions,
                 std::span<const int32_t> logit_tokens);

  // Waits until the next stage has been sent all that forward() had for it; `flushed` is whether it has. Throws when it
  // cannot be. From any thread; nothing to do in the last stage.
  void flush();
  bool flushed() const { return !sender_ || sender_->idle(); }

  int64_t ld_logits() const { return round_up(shard_.num_tokens, kPad); }

 private:
  void rotation_table(std::span<const int32_t> positions);
  void normalize(const NormWeights& norm, const float* input, float* output, int64_t rows);
  void embed(std::span<const int32_t> token_ids, std::span<const int32_t> positions);
  void linear(const Linear& weights, const float* input, int64_t ld_input, float* output, int64_t ld_output, int64_t m,
              bool accumulate);
  // Adds a product to the residual whose inputs are shared out over the ranks of the stage.
  void add_to_residual(const Linear& weights, const float* input, int64_t ld_input, int64_t m);
  float* logits(std::span<const int32_t> logit_tokens);
  void attention_block(int64_t layer, std::span<const Row> rows, int64_t tokens);
  void mlp_block(int64_t layer, const float* input, int64_t tokens);

  std::span<std::byte> residual_bytes(int64_t tokens) const {
    return {residual_->as<std::byte>(), static_cast<size_t>(tokens * ld_hidden_) * sizeof(float)};
  }

  const ModelSpec& spec_;
  const Shard shard_;
  const Weights& weights_;
  Backend& backend_;
  const Neighbours neighbours_;
  const int64_t ld_hidden_, ld_qkv_, ld_heads_, ld_inner_;

  // [max_tokens, ld_hidden]. Two where there is a next stage, which may still be sent the one while the other fills.
  Buffer residuals_[2];
  int turn_ = 0;
  Buffer* residual_ = &residuals_[0];
  Buffer partial_;  // [max_tokens, ld_hidden], with other ranks in the stage only: their sums' shares
  std::vector<int32_t> local_ids_;
  Buffer normal_;   // [max_tokens, ld_hidden]
  Buffer normal2_;  // [max_tokens, ld_hidden], parallel residual only
  Buffer qkv_;      // [max_tokens, ld_qkv]
  Buffer heads_;    // [max_tokens, ld_heads]: attention output
  Buffer inner_;    // [max_tokens, ld_inner]
  Buffer cos_sin_;  // [max_tokens, 2, rotary_half]
  Buffer logits_;   // grows with the number of logit rows
  std::optional<Sender> sender_;
};

}  // namespace fastserve
