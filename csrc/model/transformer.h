// One decoder for every family, written once over Backend.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "common/buffer.h"
#include "model/spec.h"
#include "model/weights.h"

namespace fastserve {

class Transformer {
 public:
  // max_tokens: the most tokens of one batch.
  Transformer(const ModelSpec& spec, const Weights& weights, Backend& backend, int64_t max_tokens);

  // Runs a ragged batch. rows: the jobs' tokens, back to back; token_ids and positions: [tokens]; logit_tokens: batch
  // indices of the tokens whose logits are wanted. Returns logits [logit_tokens, vocab], row stride ld_logits(), valid
  // until the next call.
  float* forward(std::span<const Row> rows, std::span<const int32_t> token_ids, std::span<const int32_t> positions,
                 std::span<const int32_t> logit_tokens);

  int64_t ld_logits() const { return round_up(spec_.vocab_size, kPad); }

 private:
  void rotation_table(std::span<const int32_t> positions);
  void normalize(const NormWeights& norm, const float* input, float* output, int64_t rows);
  void linear(const Linear& weights, const float* input, int64_t ld_input, float* output, int64_t ld_output, int64_t m,
              bool accumulate);
  void attention_block(int64_t layer, std::span<const Row> rows, int64_t tokens);
  void mlp_block(int64_t layer, const float* input, int64_t tokens);

  const ModelSpec& spec_;
  const Weights& weights_;
  Backend& backend_;
  const int64_t ld_hidden_, ld_qkv_, ld_heads_, ld_inner_;

  Buffer residual_;  // [max_tokens, ld_hidden]
  Buffer normal_;    // [max_tokens, ld_hidden]
  Buffer normal2_;   // [max_tokens, ld_hidden], parallel residual only
  Buffer qkv_;       // [max_tokens, ld_qkv]
  Buffer heads_;     // [max_tokens, ld_heads]: attention output
  Buffer inner_;     // [max_tokens, ld_inner]
  Buffer cos_sin_;   // [max_tokens, 2, rotary_half]
  Buffer logits_;    // grows with the number of logit rows
};

}  // namespace fastserve
