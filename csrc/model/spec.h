// The shape of a decoder-only transformer; mirrors fastserve/loaders/spec.py, where the fields are explained.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace fastserve {

struct ModelSpec {
  int64_t vocab_size;
  int64_t hidden_size;
  int64_t num_layers;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t intermediate_size;
  int64_t max_position;
  bool rms_norm;  // else layer norm, with biases
  float norm_eps;
  Activation activation;
  bool gated_mlp;
  std::vector<float> rope_inv_freq;  // empty: learned positions
  float rope_scale;
  int64_t position_offset;
  bool parallel_residual;
  bool qk_norm;
  bool qkv_bias;
  bool out_bias;
  bool mlp_bias;
  bool tied_embeddings;

  int64_t qkv_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  // Where the up projection starts in the fused gate-and-up output.
  int64_t up_offset() const { return gated_mlp ? round_up(intermediate_size, kPad) : 0; }
  // Throws when the numbers cannot belong to one model, or (see Shard) to a part of one.
  void validate() const;
};

}  // namespace fastserve
