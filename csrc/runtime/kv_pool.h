// The device's KV blocks: one arena, block-major (backend.h, KvLayout).
#pragma once

#include "backend/backend.h"
#include "common/buffer.h"

namespace fastserve {

class KvPool {
 public:
  KvPool(const KvLayout& layout, int64_t num_blocks) : layout_(layout), data_(layout.block_bytes() * num_blocks) {}

  const KvLayout& layout() const { return layout_; }
  void* base() const { return data_.as<void>(); }

 private:
  KvLayout layout_;
  Buffer data_;
};

}  // namespace fastserve
