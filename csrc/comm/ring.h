// Messages from one rank to another through memory they share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "comm/communicator.h"

namespace fastserve {

inline constexpr int64_t kRingBytes = 256 << 10;

// Each message is its length in 8 bytes and its data, padded to 8. Both counters only grow. Zero at first.
struct Ring {
  alignas(64) std::atomic<int64_t> written;
  alignas(64) std::atomic<int64_t> read;
  alignas(64) std::byte bytes[kRingBytes];
};

struct Transfer final : Message {
  Transfer(int peer, std::byte* data, int64_t size) : Message(peer), data(data), size(size) {}
  std::byte* const data;  // only read where it is sent
  const int64_t size;
  int64_t announced = -1;  // the length that was written or read; -1: neither yet
  int64_t moved = 0;       // of data
};

enum class Moved { kNothing, kSome, kAll };

// Moves as much of the message as there is room for, or of it there is. A message of another length than was announced
// is not moved. One process pushes, one pulls.
Moved push(Ring& ring, Transfer& message);
Moved pull(Ring& ring, Transfer& message);

}  // namespace fastserve
