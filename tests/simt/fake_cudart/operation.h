// Work that is queued on a stream, and what it happens after.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fake_cudart {

// A vector clock: for every actor (the host, a stream, a branch of a graph) how many of its operations have happened
// before. All host threads are one actor, in the order of their calls: what orders them among themselves, mutexes, is
// not seen here and is ThreadSanitizer's to check.
class Clock {
 public:
  uint64_t operator[](size_t actor) const { return actor < counts_.size() ? counts_[actor] : 0; }
  void set(size_t actor, uint64_t count) {
    if (actor >= counts_.size()) counts_.resize(actor + 1, 0);
    counts_[actor] = count;
  }
  void join(const Clock& other) {
    for (size_t actor = 0; actor < other.counts_.size(); ++actor) {
      if (other.counts_[actor] > (*this)[actor]) set(actor, other.counts_[actor]);
    }
  }

 private:
  std::vector<uint64_t> counts_;
};

constexpr size_t kHost = 0;  // the actor

struct Range {
  const char* begin;
  const char* end;
  bool write;
};

// A pointer into an allocation, by the allocation's number.
struct Mention {
  const char* pointer;
  uint64_t allocation;
};

// What an operation does, whenever and as often as it is done.
struct Task {
  std::string name;
  std::vector<Range> ranges;       // the bytes it touches, as far as known
  std::vector<Mention> mentioned;  // allocations that it may touch
  std::function<void()> action;
  bool is_host_function = false;
  std::function<bool()> ready;  // waits for other processes first, until this is so; null: does not
};

struct Operation {
  enum class State { kPending, kRunning, kDone };

  Task task;
  size_t actor = 0;
  uint64_t number = 0;  // among its actor's
  Clock clock;          // of all that happens before, itself included
  std::vector<std::shared_ptr<Operation>> after;
  State state = State::kPending;
  double done_at = 0;  // seconds
  std::chrono::steady_clock::time_point not_over_before;

  std::string describe() const;
};

}  // namespace fake_cudart
