// Brings tiles of K and V from the blocks of the paged pool to shared memory.
#pragma once

#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/attention_tile.cuh"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

enum KvPart { kKeys, kValues };

// A thread's part of every panel of a tile: some successive rows of one 16-byte chunk, so that a warp's 32 parts are
// whole lines of memory. Columns that the pool's rows do not have, and positions from `context` on, of which nothing is
// read, are zeros.
template <int kDim, int kThreads>
class KvGather {
  static constexpr int kChunks = Panel<kDim>::kChunks;
  static constexpr int kRows = kKeyTile * kChunks / kThreads;  // a thread's, of a tile
  static_assert(kKeyTile * kChunks % kThreads == 0 && kKeyTile % kRows == 0);

 public:
  __device__ __forceinline__ KvGather(const AttentionShape& shape, int kv_head, int table, int context)
      : tables_(shape.tables),
        table_(table),
        context_(context),
        block_size_(shape.block_size),
        row_bytes_(shape.row_bytes),
        block_bytes_(shape.block_bytes),
        head_bytes_(shape.head_bytes),
        head_(shape.pool + 2 * kv_head * shape.head_bytes),
        row_(static_cast<int>(threadIdx.x) / kChunks * kRows),
        chunk_(static_cast<int>(threadIdx.x) % kChunks) {}

  // To be called before a tile is copied. Where a thread's rows are all in one block, it is read ahead which, because
  // the copies wait for that.
  __device__ __forceinline__ void find(int tile_position) {
    if (block_size_ % kRows == 0) locate(tile_position + row_);
  }

  __device__ __forceinline__ void copy(KvPart part, int panel, int tile_position, unsigned char* to) {
    const int position = tile_position + row_;
    const int column = (panel * kChunks + chunk_) * 16;
    const bool inside = column < row_bytes_;
    const unsigned char* from = head_ + part * head_bytes_ + (inside ? column : 0);
    if (block_size_ % kRows == 0) {
      from += block_ * block_bytes_ + slot_ * row_bytes_;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        copy_async(to + Panel<kDim>::offset(row_ + i, chunk_), from + i * row_bytes_,
                   inside && position + i < context_);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        locate(position + i);
        copy_async(to + Panel<kDim>::offset(row_ + i, chunk_), from + block_ * block_bytes_ + slot_ * row_bytes_,
                   inside && position + i < context_);
      }
    }
  }

 private:
  __device__ __forceinline__ void locate(int position) {
    const unsigned index = static_cast<unsigned>(position) / static_cast<unsigned>(block_size_);
    slot_ = position - static_cast<int>(index) * block_size_;
    block_ = position < context_ ? tables_[table_ + static_cast<int>(index)] : 0;
  }

  const int32_t* tables_;
  const int table_, context_, block_size_, row_bytes_;
  const int64_t block_bytes_, head_bytes_;
  const unsigned char* head_;  // K in block 0
  const int row_, chunk_;
  int slot_ = 0, block_ = 0;
};

}  // namespace fastserve::cuda
