// The KV blocks: one arena on the device and one in host memory, both block-major (backend.h, KvLayout), so that a
// block moves between them as it is.
#pragma once

#include <cstddef>

#include "backend/backend.h"
#include "common/buffer.h"

namespace fastserve {

enum class Tier { kDevice, kHost };

class KvPool {
 public:
  KvPool(const KvLayout& layout, int64_t num_blocks, int64_t num_host_blocks)
      : layout_(layout),
        num_blocks_{num_blocks, num_host_blocks},
        arenas_{Buffer(layout.block_bytes() * num_blocks), Buffer(layout.block_bytes() * num_host_blocks)} {}

  const KvLayout& layout() const { return layout_; }
  int64_t num_blocks(Tier tier) const { return num_blocks_[static_cast<int>(tier)]; }
  std::byte* block(Tier tier, int64_t index) const {
    return arenas_[static_cast<int>(tier)].as<std::byte>() + index * layout_.block_bytes();
  }

 private:
  KvLayout layout_;
  int64_t num_blocks_[2];
  Buffer arenas_[2];
};

}  // namespace fastserve
