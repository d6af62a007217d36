// One decoder for every family, written once over Backend.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/device_communicator.h"
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

  // Runs a ragged batch. Returns logits [logit_tokens, shard.num_tokens] in the backend's memory, row stride
  // ld_logits(), valid until the next call; null where this is not the last stage, and the next one gets the residual
  // while this one goes on. All ranks take part.
  float* forward(const Batch& batch);

  // Waits until the next stage has been sent all that forward() had for it; `flushed` is whether it has. Throws when it
  // cannot be. From any thread; nothing to do in the last stage, nor where devices send: a batch is done when they
  // have.
  void flush();
  bool flushed() const { return !sender_ || sender_->idle(); }

  int64_t ld_logits() const { return round_up(shard_.num_tokens, kPad); }

 private:
  enum class Rows { kAll, kOfLogits };

  Buffer floats(int64_t count) { return backend_.allocate(count * static_cast<int64_t>(sizeof(float))); }
  Buffer activations(int64_t count) { return backend_.allocate(count * size_of(backend_.activations())); }

  void embed(int64_t tokens);
  void layers(int64_t tokens);
  void attention_block(int64_t layer, int64_t tokens);
  void mlp_block(int64_t layer, const void* input, int64_t tokens);
  void logits(int64_t count);
  void normalize(const NormWeights& norm, const float* input, void* output, int64_t count, Rows rows = Rows::kAll);
  // To activations.
  void linear(const Linear& weights, const void* input, int64_t ld_input, void* output, int64_t ld_output, int64_t m,
              const ActivationArgs* activation = nullptr);
  // Adds a product to the residual whose inputs are shared out over the ranks of the stage.
  void add_to_residual(const Linear& weights, const void* input, int64_t ld_input, int64_t m);
  void all_reduce(float* values, int64_t count);

  float* residual() const { return residuals_[turn_].as<float>(); }
  // The residual as messages carry it.
  std::span<std::byte> message(int64_t tokens) const {
    const Buffer& held = backend_.on_host() ? residuals_[turn_] : messages_[turn_];
    return {held.as<std::byte>(), static_cast<size_t>(tokens * ld_hidden_) * sizeof(float)};
  }

  const ModelSpec& spec_;
  const Shard shard_;
  const Weights& weights_;
  Backend& backend_;
  const Neighbours neighbours_;
  const int64_t most_tokens_;  // of one batch, filled up
  const int64_t ld_hidden_, ld_qkv_, ld_heads_, ld_inner_;

  // [most_tokens, ld_hidden]. Two where the host sends to a next stage, which may still be sent the one while the other
  // fills.
  Buffer residuals_[2];
  Buffer messages_[2];  // the same on the host, where the backend's memory is elsewhere and the host sends or receives
  int turn_ = 0;
  Buffer partial_;        // [most_tokens, ld_hidden], with other ranks in the stage only: their sums' shares
  Buffer reduced_;        // the same on the host, where the backend's memory is elsewhere and the host sums
  Buffer normal_;         // activations [most_tokens, ld_hidden]
  Buffer normal2_;        // activations [most_tokens, ld_hidden], parallel residual only
  Buffer qkv_;            // activations [most_tokens, ld_qkv]
  Buffer heads_;          // activations [most_tokens, ld_heads]: attention output
  Buffer inner_;          // activations [most_tokens, ld_inner]
  Buffer rope_inv_freq_;  // [rotary_half]
  Buffer cos_sin_;        // [most_tokens, 2, rotary_half]
  Buffer logits_;         // grows with the number of logit rows
  std::unique_ptr<DeviceCommunicator> stage_, before_, after_;  // where devices reach each other: in place of the host
  std::optional<Sender> sender_;
};

}  // namespace fastserve
