// The memory that the ranks of a communicator share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace fake_nccl {

constexpr int kMaxRanks = 8;
constexpr size_t kMaxBytes = size_t{4} << 20;  // of a rank's part in one operation

// Room for one part, and how often it was filled and emptied. All parts are as long as the first of them says.
struct Slot {
  std::atomic<uint64_t> filled, emptied;
  uint64_t bytes;
  alignas(64) char data[kMaxBytes];
};

struct Shared {
  std::atomic<int> joined;
  Slot gathered[kMaxRanks][2];  // by rank; they take turns
  Slot sent[kMaxRanks][kMaxRanks];
};

// Mapped; its name is gone when all are there, or with any of them.
class Room {
 public:
  Room(std::string name, int size);
  ~Room();
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  bool complete() const { return shared_->joined.load() == size_; }
  Shared* operator->() const { return shared_; }

 private:
  const std::string name_;
  const int size_;
  Shared* shared_;
};

}  // namespace fake_nccl
