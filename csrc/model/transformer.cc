#include "model/transformer.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "common/check.h"

namespace fastserve {

namespace {
Buffer floats(int64_t count) { return Buffer(count * sizeof(float)); }
}  // namespace

Transformer::Transformer(const ModelSpec& spec, const Shard& shard, const Weights& weights, Backend& backend,
                         int64_t max_tokens, const Neighbours& neighbours,
                         std::function<void(std::exception_ptr)> failed)
    : spec_(spec),
      shard_(shard),
      weights_(weights),
      backend_(backend),
      neighbours_(neighbours),
      ld_hidden_(round_up(spec.hidden_size, kPad)),
      ld_qkv_(round_up(spec.qkv_width(), kPad)),
      ld_heads_(round_up(spec.num_heads * spec.head_dim, kPad)),
      ld_inner_(round_up(spec.up_offset() + spec.intermediate_size, kPad)),
      residuals_{floats(max_tokens * ld_hidden_), floats(shard.last_stage ? 0 : max_tokens * ld_hidden_)},
      partial_(floats(neighbours.tensor != nullptr ? max_tokens * ld_hidden_ : 0)),
      normal_(floats(max_tokens * ld_hidden_)),
      normal2_(floats(spec.parallel_residual ? max_tokens * ld_hidden_ : 0)),
      qkv_(floats(max_tokens * ld_qkv_)),
      heads_(floats(max_tokens * ld_heads_)),
      inner_(floats(max_tokens * ld_inner_)),
      cos_sin_(floats(max_tokens * 2 * static_cast<int64_t>(spec.rope_inv_freq.size()))) {
  FS_CHECK(shard.first_stage == (neighbours.receives == nullptr) && shard.last_stage == (neighbours.sends == nullptr),
           "a stage receives unless it is the first, and sends unless it is the last");
  if (neighbours.sends != nullptr) {
    sender_.emplace(*neighbours.sends, neighbours.sends->rank() + 1, std::move(failed));
  }
}

float* Transformer::forward(std::span<const Row> rows, std::span<const int32_t> token_ids,
                            std::span<const int32_t> positions, std::span<const int32_t> logit_tokens) {
  const auto tokens = static_cast<int64_t>(token_ids.size());
  if (sender_) {
    sender_->wait(1);  // then the one before the last is sent, and its buffer free
    turn_ = 1 - turn_;
    residual_ = &residuals_[turn_];
  }
  if (shard_.first_stage) {
    embed(token_ids, positions);
  } else {
    Communicator& pipeline = *neighbours_.receives;
    pipeline.wait(*pipeline.receive(residual_bytes(tokens), pipeline.rank() - 1));
  }
  if (!spec_.rope_inv_freq.empty()) rotation_table(positions);

  float* residual = residual_->as<float>();
  for (int64_t i = 0; i < spec_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[i];
    normalize(layer.attn_norm, residual, normal_.as<float>(), tokens);
    if (spec_.parallel_residual) {  // both branches read the residual as it was
      normalize(layer.mlp_norm, residual, normal2_.as<float>(), tokens);
      attention_block(i, rows, tokens);
      mlp_block(i, normal2_.as<float>(), tokens);
    } else {
      attention_block(i, rows, tokens);
      normalize(layer.mlp_norm, residual, normal_.as<float>(), tokens);
      mlp_block(i, normal_.as<float>(), tokens);
    }
  }
  if (shard_.last_stage) return logits(logit_tokens);
  sender_->send(residual_bytes(tokens));
  return nullptr;
}

void Transformer::flush() {
  if (sender_) sender_->wait(0);
}

// A token's embedding is with the rank that has its row; the others add zeros.
void Transformer::embed(std::span<const int32_t> token_ids, std::span<const int32_t> positions) {
  const auto tokens = static_cast<int64_t>(token_ids.size());
  float* residual = residual_->as<float>();
  if (neighbours_.tensor == nullptr) {
    backend_.embed(*weights_.token_embedding, token_ids.data(), tokens, residual, ld_hidden_, false);
  } else {
    local_ids_.clear();
    for (const int32_t token : token_ids) {
      const int64_t row = token - shard_.first_token;
      local_ids_.push_back(row >= 0 && row < shard_.num_tokens ? static_cast<int32_t>(row) : -1);
    }
    backend_.embed(*weights_.token_embedding, local_ids_.data(), tokens, residual, ld_hidden_, false);
    neighbours_.tensor->all_reduce_sum({residual, static_cast<size_t>(tokens * ld_hidden_)});
  }
  if (weights_.position_embedding) {
    backend_.embed(*weights_.position_embedding, positions.data(), tokens, residual, ld_hidden_, true);
  }
}

float* Transformer::logits(std::span<const int32_t> logit_tokens) {
  const auto wanted = static_cast<int64_t>(logit_tokens.size());
  const auto bytes = wanted * ld_logits() * static_cast<int64_t>(sizeof(float));
  if (static_cast<int64_t>(logits_.bytes()) < bytes) logits_ = Buffer(bytes);
  float* residual = residual_->as<float>();
  float* gathered = normal_.as<float>();
  for (int64_t i = 0; i < wanted; ++i) {
    const float* from = residual + logit_tokens[i] * ld_hidden_;
    // Gathering in place: rows move towards the front, so none is overwritten before it is read.
    std::memmove(residual + i * ld_hidden_, from, ld_hidden_ * sizeof(float));
  }
  normalize(weights_.final_norm, residual, gathered, wanted);
  backend_.gemm({.input = gathered,
                 .ld_input = ld_hidden_,
                 .weight = &weights_.lm_head(),
                 .bias = nullptr,
                 .output = logits_.as<float>(),
                 .ld_output = ld_logits(),
                 .m = wanted,
                 .accumulate = false});
  return logits_.as<float>();
}

// cos and sin of every token's angles, in float32 throughout, as the reference implementations compute them.
void Transformer::rotation_table(std::span<const int32_t> positions) {
  const size_t half = spec_.rope_inv_freq.size();
  float* out = cos_sin_.as<float>();
  for (const int32_t position : positions) {
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * spec_.rope_inv_freq[i];
      out[i] = std::cos(angle) * spec_.rope_scale;
      out[half + i] = std::sin(angle) * spec_.rope_scale;
    }
    out += 2 * half;
  }
}

void Transformer::normalize(const NormWeights& norm, const float* input, float* output, int64_t rows) {
  backend_.norm({.input = input,
                 .output = output,
                 .weight = norm.weight.get(),
                 .bias = norm.bias.get(),
                 .rows = rows,
                 .width = spec_.hidden_size,
                 .ld = ld_hidden_,
                 .eps = spec_.norm_eps});
}

void Transformer::linear(const Linear& weights, const float* input, int64_t ld_input, float* output, int64_t ld_output,
                         int64_t m, bool accumulate) {
  backend_.gemm({.input = input,
                 .ld_input = ld_input,
                 .weight = weights.weight.get(),
                 .bias = weights.bias.get(),
                 .output = output,
                 .ld_output = ld_output,
                 .m = m,
                 .accumulate = accumulate});
}

// The sum over ranks is taken before the residual is added, so that all of them add the same.
void Transformer::add_to_residual(const Linear& weights, const float* input, int64_t ld_input, int64_t m) {
  float* residual = residual_->as<float>();
  if (neighbours_.tensor == nullptr) return linear(weights, input, ld_input, residual, ld_hidden_, m, true);
  float* partial = partial_.as<float>();
  linear(weights, input, ld_input, partial, ld_hidden_, m, false);
  neighbours_.tensor->all_reduce_sum({partial, static_cast<size_t>(m * ld_hidden_)});
  backend_.add(partial, residual, m * ld_hidden_);
}

void Transformer::attention_block(int64_t index, std::span<const Row> rows, int64_t tokens) {
  const LayerWeights& layer = weights_.layers[index];
  const auto num_rows = static_cast<int64_t>(rows.size());
  float* qkv = qkv_.as<float>();
  linear(layer.qkv, normal_.as<float>(), ld_hidden_, qkv, ld_qkv_, tokens, false);
  backend_.rope_and_store({.qkv = qkv,
                           .ld = ld_qkv_,
                           .cos_sin = spec_.rope_inv_freq.empty() ? nullptr : cos_sin_.as<float>(),
                           .rotary_half = static_cast<int64_t>(spec_.rope_inv_freq.size()),
                           .q_norm = layer.q_norm.get(),
                           .k_norm = layer.k_norm.get(),
                           .eps = spec_.norm_eps,
                           .num_heads = spec_.num_heads,
                           .rows = rows.data(),
                           .num_rows = num_rows,
                           .layer = index});
  backend_.attention({.qkv = qkv,
                      .ld = ld_qkv_,
                      .output = heads_.as<float>(),
                      .ld_output = ld_heads_,
                      .num_heads = spec_.num_heads,
                      .query_group = shard_.query_group,
                      .query_offset = shard_.query_offset,
                      .scale = 1.0f / std::sqrt(static_cast<float>(spec_.head_dim)),
                      .rows = rows.data(),
                      .num_rows = num_rows,
                      .layer = index});
  add_to_residual(layer.out, heads_.as<float>(), ld_heads_, tokens);
}

void Transformer::mlp_block(int64_t index, const float* input, int64_t tokens) {
  const LayerWeights& layer = weights_.layers[index];
  float* inner = inner_.as<float>();
  linear(layer.up, input, ld_hidden_, inner, ld_inner_, tokens, false);
  backend_.activate(spec_.activation, spec_.gated_mlp, inner, tokens, spec_.intermediate_size, ld_inner_);
  add_to_residual(layer.down, inner, ld_inner_, tokens);
}

}  // namespace fastserve
