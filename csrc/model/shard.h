// Which part of a model a rank holds; mirrors fastserve/sharding.py. Sizes in a ModelSpec are those of the part, but
// for the vocabulary, of which tokens are.
#pragma once

#include <cstdint>

#include "model/spec.h"

namespace fastserve {

struct Shard {
  int64_t query_group;   // query heads that read one KV head
  int64_t query_offset;  // query heads of the first KV head that are with the rank before
  int64_t first_token;   // rows of the embedding and of the LM head: [first_token, first_token + num_tokens)
  int64_t num_tokens;
  bool first_stage = true;  // holds the embedding
  bool last_stage = true;   // holds the final norm and the LM head
  bool adds_biases = true;  // to sums over the ranks of a stage

  static Shard whole(const ModelSpec& spec) {
    return {.query_group = spec.num_heads / spec.num_kv_heads,
            .query_offset = 0,
            .first_token = 0,
            .num_tokens = spec.vocab_size};
  }
  bool has_embedding(const ModelSpec& spec) const { return first_stage || (last_stage && spec.tied_embeddings); }
  // Throws when the part cannot belong to one model.
  void validate(const ModelSpec& spec) const;
};

}  // namespace fastserve
