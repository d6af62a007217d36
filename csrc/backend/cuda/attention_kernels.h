// What attention.cu asks of the kernels, each in a file of its own, and may choose freely: no choice changes a bit.
#pragma once

#include "backend/cuda/kernels.h"

namespace fastserve::cuda {

// A call as kernels take it.
struct AttentionShape {
  const void* qkv;
  void* output;
  int64_t ld, ld_output;  // elements
  int num_heads, head_dim, query_group, query_offset;
  float scale;  // of scores whose powers of 2 are weights
  // The pool: K of KV head h in block b is at pool + b · block_bytes + 2h · head_bytes, V is head_bytes further, and a
  // slot takes row_bytes.
  const unsigned char* pool;
  int64_t block_bytes, head_bytes;
  int num_kv_heads, block_size, row_bytes;

  const BatchRow* rows;
  const int32_t* tables;
};
AttentionShape attention_shape(const AttentionCall& call, const DeviceBatch& batch);

// 16-bit types. A block takes `block_warps` · 16 tokens of one head, 4 or 8 warps: the smaller ones fill a device with
// a short chunk, the larger ones read K and V less often.
void attention_prefill(DType dtype, const AttentionShape& shape, const PrefillTile* tiles, int64_t num_tiles,
                       int block_warps, cudaStream_t stream);

// Workspaces begin with this many int32, of which each row and head has one; it is zero between calls.
constexpr int64_t kCounters = 65536;

// Blocks that share a row leave there, of each of its segments and heads, Σ weight · V, padded as the pool's rows are,
// and in so many more floats the maximum and the sum: 16 bytes, as the rest is a multiple of that.
constexpr int kStatFloats = 4;

// 16-bit types: the batch's decode rows. Up to `splits` blocks share a row's segments of one KV head; more than one
// only if there are as many counters as rows times heads.
void attention_decode(DType dtype, const AttentionShape& shape, const DeviceBatch& batch, int64_t splits,
                      void* workspace, cudaStream_t stream);

// float32: every token of the batch.
void attention_f32(const AttentionShape& shape, const int32_t* token_rows, int64_t num_tokens, cudaStream_t stream);

}  // namespace fastserve::cuda
