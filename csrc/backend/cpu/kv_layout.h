// Geometry of the CPU's paged KV pool.
#pragma once

#include "backend/backend.h"
#include "common/check.h"

namespace fastserve::cpu {

// How the CPU's KV pool lies in memory. A block is
// [layers][kv heads]{ K [dimensions / step][slots][step], V [slots / step][dimensions][step] }. K lies transposed so
// that the score of many tokens is one vector; `step` neighbours in the direction of a sum are together, which is what
// dot product instructions read: 2 of bfloat16, 4 of int8. All of it is padded to whole vectors, with zeros. int8,
// held as value + 128, is followed by the float32 scales of K [slots] and of V [slots].
struct KvLayout : KvShape {
  int64_t step() const { return 4 / size_of(format); }
  int64_t slots_padded() const { return round_up(block_size, 16); }
  int64_t head_dim_padded() const { return round_up(head_dim, 16); }
  int64_t value_offset() const { return round_up(head_dim, step()) * slots_padded(); }
  int64_t scale_offset() const { return value_offset() + round_up(block_size, step()) * head_dim_padded(); }
  int64_t scale_bytes() const { return format == KvFormat::kInt8 ? 2 * slots_padded() * 4 : 0; }
  int64_t head_elements() const { return scale_offset() + scale_bytes(); }  // an element of int8 is a byte
  int64_t layer_elements() const { return num_kv_heads * head_elements(); }
  int64_t block_bytes() const { return num_layers * layer_elements() * size_of(format); }
};

inline KvLayout layout_of(const KvShape& shape) {
  FS_CHECK(shape.format != KvFormat::kFloat16, "the CPU holds no keys and values in float16: use bfloat16 or float32");
  return {shape};
}

}  // namespace fastserve::cpu
