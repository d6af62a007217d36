#include "model/transformer.h"

#include <cmath>
#include <cstring>

namespace fastserve {

namespace {
Buffer floats(int64_t count) { return Buffer(count * sizeof(float)); }
}  // namespace

Transformer::Transformer(const ModelSpec& spec, const Weights& weights, Backend& backend, int64_t max_tokens)
    : spec_(spec),
      weights_(weights),
      backend_(backend),
      ld_hidden_(round_up(spec.hidden_size, kPad)),
      ld_qkv_(round_up(spec.qkv_width(), kPad)),
      ld_heads_(round_up(spec.num_heads * spec.head_dim, kPad)),
      ld_inner_(round_up(spec.up_offset() + spec.intermediate_size, kPad)),
      residual_(floats(max_tokens * ld_hidden_)),
      normal_(floats(max_tokens * ld_hidden_)),
      normal2_(floats(spec.parallel_residual ? max_tokens * ld_hidden_ : 0)),
      qkv_(floats(max_tokens * ld_qkv_)),
      heads_(floats(max_tokens * ld_heads_)),
      inner_(floats(max_tokens * ld_inner_)),
      cos_sin_(floats(max_tokens * 2 * static_cast<int64_t>(spec.rope_inv_freq.size()))) {}

float* Transformer::forward(std::span<const Row> rows, std::span<const int32_t> token_ids,
                            std::span<const int32_t> positions, std::span<const int32_t> logit_tokens) {
  const auto tokens = static_cast<int64_t>(token_ids.size());
  float* residual = residual_.as<float>();
  backend_.embed(*weights_.token_embedding, token_ids.data(), tokens, residual, ld_hidden_, false);
  if (weights_.position_embedding) {
    backend_.embed(*weights_.position_embedding, positions.data(), tokens, residual, ld_hidden_, true);
  } else {
    rotation_table(positions);
  }

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

  const auto wanted = static_cast<int64_t>(logit_tokens.size());
  const auto bytes = wanted * ld_logits() * static_cast<int64_t>(sizeof(float));
  if (static_cast<int64_t>(logits_.bytes()) < bytes) logits_ = Buffer(bytes);
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
                      .scale = 1.0f / std::sqrt(static_cast<float>(spec_.head_dim)),
                      .rows = rows.data(),
                      .num_rows = num_rows,
                      .layer = index});
  linear(layer.out, heads_.as<float>(), ld_heads_, residual_.as<float>(), ld_hidden_, tokens, true);
}

void Transformer::mlp_block(int64_t index, const float* input, int64_t tokens) {
  const LayerWeights& layer = weights_.layers[index];
  float* inner = inner_.as<float>();
  linear(layer.up, input, ld_hidden_, inner, ld_inner_, tokens, false);
  backend_.activate(spec_.activation, spec_.gated_mlp, inner, tokens, spec_.intermediate_size, ld_inner_);
  linear(layer.down, inner, ld_inner_, residual_.as<float>(), ld_hidden_, tokens, true);
}

}  // namespace fastserve
