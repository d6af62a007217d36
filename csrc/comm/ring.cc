#include "comm/ring.h"

#include <algorithm>
#include <cstring>

#include "common/dtype.h"

namespace fastserve {

namespace {

constexpr int64_t kLengthBytes = sizeof(Transfer::size);

// Calls copy(place in the ring, offset in the data, bytes) for `count` bytes of the message, and moves `position` on.
template <class Copy>
void for_pieces(Ring& ring, Transfer& message, int64_t& position, int64_t count, Copy&& copy) {
  while (count > 0) {
    const int64_t piece = std::min(count, kRingBytes - position % kRingBytes);
    copy(ring.bytes + position % kRingBytes, message.data + message.moved, piece);
    message.moved += piece;
    position += piece;
    count -= piece;
  }
}

}  // namespace

// A length never lies across the ring's end, because messages begin at multiples of 8. The padding of the last may make
// the ring seem more than full.
Moved push(Ring& ring, Transfer& message) {
  int64_t written = ring.written.load(std::memory_order_relaxed);
  int64_t room = kRingBytes - (written - ring.read.load(std::memory_order_acquire));
  if (room < (message.announced < 0 ? kLengthBytes : 1)) return Moved::kNothing;
  if (message.announced < 0) {
    std::memcpy(ring.bytes + written % kRingBytes, &message.size, kLengthBytes);
    message.announced = message.size;
    written += kLengthBytes;
    room -= kLengthBytes;
  }
  for_pieces(ring, message, written, std::min(room, message.size - message.moved),
             [](std::byte* place, const std::byte* data, int64_t bytes) { std::memcpy(place, data, bytes); });
  const bool all = message.moved == message.size;
  ring.written.store(all ? round_up(written, kLengthBytes) : written);
  return all ? Moved::kAll : Moved::kSome;
}

Moved pull(Ring& ring, Transfer& message) {
  int64_t read = ring.read.load(std::memory_order_relaxed);
  int64_t there = ring.written.load(std::memory_order_acquire) - read;
  if (there <= 0) return Moved::kNothing;
  if (message.announced < 0) {
    std::memcpy(&message.announced, ring.bytes + read % kRingBytes, kLengthBytes);
    read += kLengthBytes;
    there -= kLengthBytes;
  }
  if (message.announced != message.size) return Moved::kNothing;
  for_pieces(ring, message, read, std::min(there, message.size - message.moved),
             [](const std::byte* place, std::byte* data, int64_t bytes) { std::memcpy(data, place, bytes); });
  const bool all = message.moved == message.size;
  ring.read.store(all ? round_up(read, kLengthBytes) : read);
  return all ? Moved::kAll : Moved::kSome;
}

}  // namespace fastserve
