// Geometry of the CUDA backend's paged KV pool.
#pragma once

#include "backend/backend.h"
#include "common/check.h"

namespace fastserve::cuda {

constexpr int64_t kMaxHeadDim = 256;

// A block is [layers][kv heads][K, V][slots][head_dim_padded]: rows of K and V are padded with zeros to a multiple of
// 16 elements, and so 16-byte aligned.
struct KvLayout : KvShape {
  int64_t head_dim_padded() const { return round_up(head_dim, 16); }
  int64_t head_elements() const { return block_size * head_dim_padded(); }       // of K, or of V
  int64_t layer_elements() const { return 2 * num_kv_heads * head_elements(); }  // one layer of a block
  int64_t block_elements() const { return num_layers * layer_elements(); }
  int64_t block_bytes() const { return block_elements() * size_of(format); }
};

inline KvLayout layout_of(const KvShape& shape) {
  FS_CHECK(shape.format != KvFormat::kInt8,
           "the CUDA backend holds no keys and values in int8: use the type of the model (auto)");
  FS_CHECK(shape.head_dim <= kMaxHeadDim, "the CUDA backend takes heads of up to ", kMaxHeadDim,
           " dimensions, the model's have ", shape.head_dim);
  return {shape};
}

}  // namespace fastserve::cuda
