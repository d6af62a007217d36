// Which kernels an iteration's attention takes.
#include "backend/backend.h"
#include "backend/cuda/attention_kernels.h"

namespace fastserve::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;  // weights are powers of two

// A device has work enough from about this many blocks on. Theirs is the choice between few blocks that read little and
// many that fill it.
constexpr int64_t kPrefillBlocks = 264;  // of 8 warps
constexpr int64_t kDecodeBlocks = 2048;  // of which some may find no segment

// Blocks that share a decode row's segments of one KV head.
int64_t decode_splits(int64_t num_heads, const KvLayout& pool, int64_t decodes) {
  return decodes * num_heads > kCounters ? 1 : ceil_div(kDecodeBlocks, decodes * pool.num_kv_heads);
}

}  // namespace

AttentionShape attention_shape(const AttentionCall& call, const DeviceBatch& batch) {
  const KvView& pool = call.pool;
  FS_CHECK(pool.head_dim <= kMaxHeadDim, "attention takes heads of up to ", kMaxHeadDim, " dimensions, got ",
           pool.head_dim);
  const int64_t size = size_of(call.dtype);
  return {call.qkv,
          call.output,
          call.ld,
          call.ld_output,
          static_cast<int>(call.num_heads),
          static_cast<int>(pool.head_dim),
          static_cast<int>(call.query_group),
          static_cast<int>(call.query_offset),
          call.scale * kLog2E,
          static_cast<const unsigned char*>(pool.base) + call.layer * pool.layer_elements() * size,
          pool.block_elements() * size,
          pool.head_elements() * size,
          static_cast<int>(pool.num_kv_heads),
          static_cast<int>(pool.block_size),
          static_cast<int>(pool.head_dim_padded() * size),
          batch.rows,
          batch.tables};
}

void attention(const AttentionCall& call, const DeviceBatch& batch, cudaStream_t stream) {
  const AttentionShape shape = attention_shape(call, batch);
  if (call.dtype == DType::kFloat32) {
    if (batch.num_tokens > 0) attention_f32(shape, batch.token_rows, batch.num_tokens, stream);
    return;
  }
  if (batch.num_tiles > 0) {
    const int block_warps = batch.num_tiles * call.num_heads < kPrefillBlocks ? 4 : 8;
    attention_prefill(call.dtype, shape, batch.tiles, batch.num_tiles, block_warps, stream);
  }
  if (batch.num_decodes > 0) {
    const int64_t splits = decode_splits(call.num_heads, call.pool, batch.num_decodes);
    attention_decode(call.dtype, shape, batch, splits, call.workspace, stream);
  }
}

int64_t attention_workspace(int64_t num_heads, const KvLayout& pool, int64_t decodes, int64_t segments) {
  const bool shared = decodes > 0 && decode_splits(num_heads, pool, decodes) > 1;
  return 4 * kCounters + (shared ? 4 * (pool.head_dim_padded() + kStatFloats) * num_heads * segments : 0);
}

}  // namespace fastserve::cuda
