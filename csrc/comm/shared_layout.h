// What lies where in the memory that ranks of one host share: a header, a desk for each rank, two slots for each, and a
// ring from each to each.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "comm/communicator.h"
#include "comm/ring.h"
#include "common/dtype.h"

namespace fastserve {

inline constexpr int64_t kSlotBytes = 256 << 10;  // of a collective's chunk: a core's nearer caches hold some

enum class Call : uint64_t { kReduce = 1, kGather, kBroadcast, kBarrier };
enum State : uint32_t { kAbsent = 0, kHere, kLeft };
enum Aborted : uint32_t { kNo = 0, kWriting, kYes };

// All of it is zero at first.
struct alignas(4096) SharedHeader {
  std::atomic<uint32_t> aborted;
  char reason[1024];
};

struct Desk {
  // Written by its rank: the number of the round it is in, and what it calls in that and the one before.
  alignas(64) std::atomic<uint64_t> arrived;
  std::atomic<uint64_t> calls[2];
  // What it parks on; others ring the bell when something has changed and it is parked.
  alignas(64) std::atomic<uint32_t> parked;
  std::atomic<uint32_t> bell;
  alignas(64) std::atomic<uint32_t> state;
  Member member;
  cpu_set_t cores;  // it may run on
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

struct SharedLayout {
  int64_t size;  // ranks

  int64_t desk(int64_t rank) const { return sizeof(SharedHeader) + rank * static_cast<int64_t>(sizeof(Desk)); }
  int64_t slot(int64_t rank, uint64_t round) const {
    return round_up(desk(size), 4096) + (2 * rank + static_cast<int64_t>(round % 2)) * kSlotBytes;
  }
  int64_t ring(int64_t from, int64_t to) const {
    return slot(size, 0) + (from * size + to) * static_cast<int64_t>(sizeof(Ring));
  }
  int64_t bytes() const { return ring(size, 0); }
};

}  // namespace fastserve
