#include "model/shard.h"

#include "common/check.h"

namespace fastserve {

void Shard::validate(const ModelSpec& spec) const {
  FS_CHECK(query_group > 0 && query_offset >= 0 && query_offset < query_group, "query_offset (", query_offset,
           ") must lie in the first KV head's ", query_group, " query heads");
  FS_CHECK(ceil_div(query_offset + spec.num_heads, query_group) == spec.num_kv_heads, "num_heads (", spec.num_heads,
           ") from ", query_offset, " on must be read by num_kv_heads (", spec.num_kv_heads, "), ", query_group,
           " each");
  FS_CHECK(first_token >= 0 && num_tokens > 0 && first_token + num_tokens <= spec.vocab_size, "tokens [", first_token,
           ", ", first_token + num_tokens, ") must lie in the vocabulary of ", spec.vocab_size);
}

}  // namespace fastserve
