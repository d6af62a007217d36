// Brings tiles of K or V from the blocks of the paged pool to shared memory.
#pragma once

#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/attention_tile.cuh"
#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

// A thread's part of every tile: some successive rows of one 16-byte chunk. The warp's 32 parts are whole rows, or
// whole 128-byte lines of them. kDim elements of a row from `first_chunk` on are taken; what the pool's rows do not
// have of them, and positions from `context` on, of which nothing is read, are zeros.
template <int kDim, int kThreads>
class KvGather {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRows = kKeyTile * kChunks / kThreads;  // a thread's, of a tile
  static_assert(kKeyTile * kChunks % kThreads == 0 && kKeyTile % kRows == 0);

 public:
  // `head` is K or V of the wanted head in block 0.
  __device__ __forceinline__ KvGather(const AttentionShape& shape, const unsigned char* head, const int32_t* table,
                                      int first_chunk, int context)
      : table_(table),
        context_(context),
        block_size_(shape.block_size),
        row_bytes_(shape.row_bytes),
        block_bytes_(shape.block_bytes),
        row_(static_cast<int>(threadIdx.x) / kChunks * kRows),
        chunk_(static_cast<int>(threadIdx.x) % kChunks) {
    const int from = (first_chunk + chunk_) * 16;
    inside_ = from < row_bytes_;
    head_ = head + (inside_ ? from : 0);
  }

  // Reads ahead which block the tile's rows are in, as far as it is one block: the copies wait for it.
  __device__ __forceinline__ void find(int tile_position) {
    if (block_size_ % kRows == 0) locate(tile_position + row_);
  }

  // Copies the tile that was found last.
  __device__ __forceinline__ void copy(int tile_position, unsigned char* tile) {
    const int position = tile_position + row_;
    if (block_size_ % kRows == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) copy_row(tile, i, position + i, i);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        locate(position + i);
        copy_row(tile, i, position + i, 0);
      }
    }
  }

 private:
  __device__ __forceinline__ void locate(int position) {
    const unsigned index = static_cast<unsigned>(position) / static_cast<unsigned>(block_size_);
    slot_ = position - static_cast<int>(index) * block_size_;
    block_ = position < context_ ? __ldg(table_ + index) : 0;
  }

  // Row i of this thread's, `next` slots after the one that was located.
  __device__ __forceinline__ void copy_row(unsigned char* tile, int i, int position, int next) {
    const unsigned char* from = head_ + block_ * block_bytes_ + static_cast<int64_t>(slot_ + next) * row_bytes_;
    copy_async(tile + SharedTile<kDim>::offset(row_ + i, chunk_), from, inside_ && position < context_);
  }

  const int32_t* table_;
  const int context_, block_size_, row_bytes_;
  const int64_t block_bytes_;
  const int row_, chunk_;
  bool inside_;
  const unsigned char* head_;
  int slot_ = 0, block_ = 0;
};

}  // namespace fastserve::cuda
