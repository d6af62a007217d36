// The KV blocks: one arena on the device and one in host memory, both block-major (backend.h, KvShape), so that a block
// moves between them as it is.
#pragma once

#include <cstddef>

#include "backend/backend.h"
#include "common/buffer.h"

namespace fastserve {

enum class Tier { kDevice, kHost };

class KvPool {
 public:
  KvPool(Backend& backend, const KvShape& shape, int64_t num_blocks, int64_t num_host_blocks)
      : backend_(backend),
        block_bytes_(backend.block_bytes(shape)),
        num_blocks_{num_blocks, num_host_blocks},
        arenas_{backend.allocate(block_bytes_ * num_blocks), backend.allocate_host(block_bytes_ * num_host_blocks)} {
    backend.set_kv_pool(shape, arenas_[0].as<std::byte>());
  }

  Backend& backend() const { return backend_; }
  int64_t block_bytes() const { return block_bytes_; }
  int64_t num_blocks(Tier tier) const { return num_blocks_[static_cast<int>(tier)]; }
  std::byte* block(Tier tier, int64_t index) const {
    return arenas_[static_cast<int>(tier)].as<std::byte>() + index * block_bytes_;
  }

 private:
  Backend& backend_;
  int64_t block_bytes_;
  int64_t num_blocks_[2];
  Buffer arenas_[2];
};

}  // namespace fastserve
