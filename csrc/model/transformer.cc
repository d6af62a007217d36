#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/check.h"

namespace fastserve {

namespace {

int64_t inner_columns(const Weights& weights) {
  int64_t most = 0;
  for (const LayerWeights& layer : weights.layers) most = std::max(most, layer.up.weight->outputs());
  return most;
}

}  // namespace

Transformer::Transformer(const ModelSpec& spec, const Shard& shard, const Weights& weights, Backend& backend,
                         int64_t max_tokens, const Neighbours& neighbours,
                         std::function<void(std::exception_ptr)> failed)
    : spec_(spec),
      shard_(shard),
      weights_(weights),
      backend_(backend),
      neighbours_(neighbours),
      most_tokens_(backend.filled_up(max_tokens)),
      ld_hidden_(round_up(spec.hidden_size, kPad)),
      ld_qkv_(round_up(spec.qkv_width(), kPad)),
      ld_heads_(round_up(spec.num_heads * spec.head_dim, kPad)),
      ld_inner_(round_up(inner_columns(weights), kPad)),
      residuals_{floats(most_tokens_ * ld_hidden_), Buffer()},
      partial_(floats(neighbours.tensor != nullptr ? most_tokens_ * ld_hidden_ : 0)),
      normal_(activations(most_tokens_ * ld_hidden_)),
      normal2_(activations(spec.parallel_residual ? most_tokens_ * ld_hidden_ : 0)),
      qkv_(activations(most_tokens_ * ld_qkv_)),
      heads_(activations(most_tokens_ * ld_heads_)),
      inner_(activations(most_tokens_ * ld_inner_)),
      rope_inv_freq_(floats(static_cast<int64_t>(spec.rope_inv_freq.size()))),
      cos_sin_(floats(most_tokens_ * 2 * static_cast<int64_t>(spec.rope_inv_freq.size()))) {
  FS_CHECK(shard.first_stage == (neighbours.receives == nullptr) && shard.last_stage == (neighbours.sends == nullptr),
           "a stage receives unless it is the first, and sends unless it is the last");
  backend.upload(spec.rope_inv_freq.data(), rope_inv_freq_.as<float>(), static_cast<int64_t>(rope_inv_freq_.bytes()));
  Communicator *tensor = neighbours.tensor, *receives = neighbours.receives, *sends = neighbours.sends;
  if (tensor != nullptr) stage_ = backend.connect(*tensor, 0, tensor->size(), most_tokens_ * ld_hidden_);
  if (receives != nullptr) before_ = backend.connect(*receives, receives->rank() - 1, 2, 0);
  if (sends != nullptr) after_ = backend.connect(*sends, sends->rank(), 2, 0);
  const bool host_receives = receives != nullptr && !before_, host_sends = sends != nullptr && !after_;
  if (host_sends) residuals_[1] = floats(most_tokens_ * ld_hidden_);
  if (!backend.on_host()) {
    const auto bytes = static_cast<int64_t>(residuals_[0].bytes());
    if (host_receives || host_sends) messages_[0] = backend.allocate_host(bytes);
    if (host_sends) messages_[1] = backend.allocate_host(bytes);
    if (tensor != nullptr && !stage_) reduced_ = backend.allocate_host(bytes);
  }
  if (host_sends) {
    sender_.emplace(*neighbours.sends, neighbours.sends->rank() + 1, std::move(failed));
  }
}

float* Transformer::forward(const Batch& batch) {
  const BatchSize size = backend_.begin(batch);
  if (sender_) {
    sender_->wait(1);  // then the one before the last is sent, and its buffer free
    turn_ = 1 - turn_;
  }
  const auto bytes = size.logits * ld_logits() * static_cast<int64_t>(sizeof(float));
  if (shard_.last_stage && static_cast<int64_t>(logits_.bytes()) < bytes) {
    backend_.forget();
    logits_ = Buffer();  // first, or both would have to fit
    logits_ = backend_.allocate(bytes);
  }
  const auto body = [&] {
    embed(size.tokens);
    layers(size.tokens);
    if (shard_.last_stage) logits(size.logits);
  };
  const bool repeatable = neighbours_.tensor == nullptr || (stage_ && stage_->repeatable());
  if (repeatable && shard_.first_stage && shard_.last_stage) {
    backend_.run(body);
  } else {
    body();  // in which the host waits for other ranks now and then, or devices do
  }
  if (shard_.last_stage) return logits_.as<float>();
  if (after_) {
    after_->send(residual(), size.tokens * ld_hidden_, 1);
    return nullptr;
  }
  const std::span<std::byte> sent = message(size.tokens);
  if (!backend_.on_host()) backend_.download(residual(), sent.data(), static_cast<int64_t>(sent.size()));
  sender_->send(sent);
  return nullptr;
}

void Transformer::flush() {
  if (sender_) sender_->wait(0);
}

// The batch's tokens, or what the stage before made of them. A token's embedding is with the rank that has its row; the
// others add zeros.
void Transformer::embed(int64_t tokens) {
  if (!spec_.rope_inv_freq.empty()) {
    backend_.rotation_table(rope_inv_freq_.as<float>(), static_cast<int64_t>(spec_.rope_inv_freq.size()),
                            spec_.rope_scale, cos_sin_.as<float>());
  }
  if (before_) return before_->receive(residual(), tokens * ld_hidden_, 0);
  if (!shard_.first_stage) {
    Communicator& pipeline = *neighbours_.receives;
    const std::span<std::byte> received = message(tokens);
    pipeline.wait(*pipeline.receive(received, pipeline.rank() - 1));
    if (!backend_.on_host()) backend_.upload(received.data(), residual(), static_cast<int64_t>(received.size()));
    return;
  }
  EmbedArgs args{.table = weights_.token_embedding.get(),
                 .by = EmbeddedBy::kToken,
                 .first = shard_.first_token,
                 .output = residual(),
                 .ld = ld_hidden_,
                 .accumulate = false};
  backend_.embed(args);
  if (neighbours_.tensor != nullptr) all_reduce(residual(), tokens * ld_hidden_);
  if (weights_.position_embedding == nullptr) return;
  args.table = weights_.position_embedding.get();
  args.by = EmbeddedBy::kPosition;
  args.first = 0;
  args.accumulate = true;
  backend_.embed(args);
}

void Transformer::layers(int64_t tokens) {
  for (int64_t i = 0; i < spec_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[i];
    normalize(layer.attn_norm, residual(), normal_.as<void>(), tokens);
    if (spec_.parallel_residual) {  // both branches read the residual as it was
      normalize(layer.mlp_norm, residual(), normal2_.as<void>(), tokens);
      attention_block(i, tokens);
      mlp_block(i, normal2_.as<void>(), tokens);
    } else {
      attention_block(i, tokens);
      normalize(layer.mlp_norm, residual(), normal_.as<void>(), tokens);
      mlp_block(i, normal_.as<void>(), tokens);
    }
  }
}

void Transformer::logits(int64_t count) {
  normalize(weights_.final_norm, residual(), normal_.as<void>(), count, Rows::kOfLogits);
  backend_.gemm({.input = normal_.as<void>(),
                 .ld_input = ld_hidden_,
                 .weight = &weights_.lm_head(),
                 .bias = nullptr,
                 .output = logits_.as<void>(),
                 .ld_output = ld_logits(),
                 .m = count,
                 .wide = true,
                 .accumulate = false});
}

void Transformer::normalize(const NormWeights& norm, const float* input, void* output, int64_t count, Rows rows) {
  backend_.norm({.input = input,
                 .output = output,
                 .weight = norm.weight.get(),
                 .bias = norm.bias.get(),
                 .rows = count,
                 .of_logits = rows == Rows::kOfLogits,
                 .width = spec_.hidden_size,
                 .ld = ld_hidden_,
                 .eps = spec_.norm_eps});
}

void Transformer::linear(const Linear& weights, const void* input, int64_t ld_input, void* output, int64_t ld_output,
                         int64_t m, const ActivationArgs* activation) {
  backend_.gemm({.input = input,
                 .ld_input = ld_input,
                 .weight = weights.weight.get(),
                 .bias = weights.bias.get(),
                 .output = output,
                 .ld_output = ld_output,
                 .m = m,
                 .wide = false,
                 .accumulate = false,
                 .activation = activation});
}

// The sum over ranks is taken before the residual is added, so that all of them add the same.
void Transformer::add_to_residual(const Linear& weights, const void* input, int64_t ld_input, int64_t m) {
  const bool alone = neighbours_.tensor == nullptr;
  float* output = alone ? residual() : partial_.as<float>();
  backend_.gemm({.input = input,
                 .ld_input = ld_input,
                 .weight = weights.weight.get(),
                 .bias = weights.bias.get(),
                 .output = output,
                 .ld_output = ld_hidden_,
                 .m = m,
                 .wide = true,
                 .accumulate = alone});
  if (alone) return;
  all_reduce(output, m * ld_hidden_);
  backend_.add(output, residual(), m * ld_hidden_);
}

void Transformer::all_reduce(float* values, int64_t count) {
  if (stage_) return stage_->all_reduce_sum(values, count);
  const auto bytes = count * static_cast<int64_t>(sizeof(float));
  float* reduced = backend_.on_host() ? values : reduced_.as<float>();
  if (!backend_.on_host()) backend_.download(values, reduced, bytes);
  neighbours_.tensor->all_reduce_sum({reduced, static_cast<size_t>(count)});
  if (!backend_.on_host()) backend_.upload(reduced, values, bytes);
}

void Transformer::attention_block(int64_t index, int64_t tokens) {
  const LayerWeights& layer = weights_.layers[index];
  void* qkv = qkv_.as<void>();
  linear(layer.qkv, normal_.as<void>(), ld_hidden_, qkv, ld_qkv_, tokens);
  backend_.rope_and_store({.qkv = qkv,
                           .ld = ld_qkv_,
                           .cos_sin = spec_.rope_inv_freq.empty() ? nullptr : cos_sin_.as<float>(),
                           .rotary_half = static_cast<int64_t>(spec_.rope_inv_freq.size()),
                           .q_norm = layer.q_norm.get(),
                           .k_norm = layer.k_norm.get(),
                           .eps = spec_.norm_eps,
                           .num_heads = spec_.num_heads,
                           .layer = index});
  backend_.attention({.qkv = qkv,
                      .ld = ld_qkv_,
                      .output = heads_.as<void>(),
                      .ld_output = ld_heads_,
                      .num_heads = spec_.num_heads,
                      .query_group = shard_.query_group,
                      .query_offset = shard_.query_offset,
                      .scale = 1.0f / std::sqrt(static_cast<float>(spec_.head_dim)),
                      .layer = index});
  add_to_residual(layer.out, heads_.as<void>(), ld_heads_, tokens);
}

void Transformer::mlp_block(int64_t index, const void* input, int64_t tokens) {
  const LayerWeights& layer = weights_.layers[index];
  void* inner = inner_.as<void>();
  const ActivationArgs activation{spec_.activation, spec_.gated_mlp, spec_.intermediate_size};
  linear(layer.up, input, ld_hidden_, inner, ld_inner_, tokens, &activation);
  add_to_residual(layer.down, inner, ld_inner_, tokens);
}

}  // namespace fastserve
