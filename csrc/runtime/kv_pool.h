// The device's KV blocks: one arena, block-major (backend.h, KvLayout).
#pragma once

#include "backend/backend.h"
#include "common/buffer.h"

namespace fastserve {

class KvPool {
 public:
  KvPool(const KvLayout& layout, int64_t num_blocks)
      : layout_(layout), num_blocks_(num_blocks), data_(layout.block_bytes() * num_blocks) {}

  const KvLayout& layout() const { return layout_; }
  int64_t num_blocks() const { return num_blocks_; }
  void* base() const { return data_.as<void>(); }

 private:
  KvLayout layout_;
  int64_t num_blocks_;
  Buffer data_;
};

}  // namespace fastserve
