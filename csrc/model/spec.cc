#include "model/spec.h"

#include "common/check.h"

namespace fastserve {

void ModelSpec::validate() const {
  FS_CHECK(vocab_size > 0 && hidden_size > 0 && num_layers > 0 && num_heads > 0 && num_kv_heads > 0 && head_dim > 0 &&
               intermediate_size > 0 && max_position > 0,
           "every size of a model must be positive");
  FS_CHECK(2 * static_cast<int64_t>(rope_inv_freq.size()) <= head_dim, "rotary dimensions (", 2 * rope_inv_freq.size(),
           ") must not exceed head_dim (", head_dim, ")");
}

}  // namespace fastserve
