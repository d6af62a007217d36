// Ranks that work on one model talk through this: collectives, in which all ranks take part in the same order, and
// messages between two of them.
//
// Sums are exact to the bit: float32, added in rank order, the same on every rank and over every kind of communicator.
//
// A wait spins briefly and then parks, and it ends: when the peer is gone, when any rank has given up, when it takes
// longer than `Patience` has. Each is a GroupError that names the rank and its host, is told to all other ranks, and is
// the last thing the communicator does.
//
// One thread at a time; communicators do not depend on each other.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/check.h"

namespace fastserve {

// Ranks cannot go on together. It is the same line on all of them, and says whose fault it is.
class GroupError : public Error {
 public:
  using Error::Error;
};

// Where a rank runs. Ranks tell each other, so the layout is fixed.
struct Member {
  int32_t world_rank;  // by which messages call it
  int32_t process;
  uint64_t machine;  // equal where ranks can share memory
  char host[240];

  std::string text() const;  // "rank 3 on node7 (process 4711)"
};

// This process, on a host of that name; empty: the system's.
Member this_member(int world_rank, const std::string& host);

// What all ranks are told of an error of this one. A GroupError says already whose it is.
std::string line_of(const std::exception_ptr& error, const Member& self);

struct Patience {
  double seconds = std::numeric_limits<double>::infinity();  // of one wait
  std::function<void()> ask;  // called some times a second while parked; what it throws ends the wait
};

// A message on its way; its memory must stay until it is done. What implements a communicator knows more of it.
struct Message {
  explicit Message(int other) : peer(other) {}
  virtual ~Message() = default;
  const int peer;
  bool done = false;
};
using Request = std::shared_ptr<Message>;

using TimePoint = std::chrono::steady_clock::time_point;
inline constexpr TimePoint kForever = TimePoint::max();

class Communicator {
 public:
  using Bytes = std::span<std::byte>;
  using ConstBytes = std::span<const std::byte>;

  // Without close() before, the other ranks are told that this one is gone.
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(members_.size()); }
  const std::vector<Member>& members() const { return members_; }
  virtual const char* kind() const = 0;

  void set_timeout(double seconds) { patience_.seconds = seconds; }
  const Patience& patience() const { return patience_; }

  // In place, `values` being as many on every rank.
  void all_reduce_sum(std::span<float> values);
  // `all` is every rank's `mine` in rank order: equally long, or of `sizes` bytes each.
  void all_gather(ConstBytes mine, Bytes all);
  void all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> sizes);
  // `data` has the same length everywhere. The root does not wait for the others to come.
  void broadcast(Bytes data, int root);
  void barrier();
  // Ranks with the same color get a communicator of their own, in the order of their keys, then ranks; those with a
  // negative color get none. The new one has the patience of this one.
  std::unique_ptr<Communicator> split(int color, int key) { return do_split(color, key); }

  // Begin a message and return at once. Messages from one rank to another arrive in order, each into a receive of its
  // own length. Long ones move while a rank waits, tests or advances.
  Request send(ConstBytes data, int to);
  Request receive(Bytes data, int from);
  bool test(Message& message);
  void wait(Message& message);
  // The same, no longer than until then; whether the message is done.
  bool wait_until(Message& message, TimePoint until);
  // Moves what can be moved of the messages that were begun; whether some are not done.
  bool advance();
  // For a wait of another kind for some of these ranks, which has taken so many seconds: throws what would end one of
  // these here.
  void look(double seconds, std::span<const int> awaited);
  // Waits of this communicator advance the other as well, which must not be gone before.
  void advance_meanwhile(Communicator& other) { meanwhile_ = &other; }

  // Ends every wait of every rank with a GroupError that says this. From any thread.
  void abort(const std::string& reason);
  // Leaves in order: no message is open, unless a rank has given up. Others may still wait for each other.
  void close();
  // Takes over the communicator that this one was made by means of: closed and aborted with it.
  void keep(std::unique_ptr<Communicator> other) { kept_ = std::move(other); }

 protected:
  Communicator(int rank, std::vector<Member> members, Patience patience)
      : rank_(rank), members_(std::move(members)), patience_(std::move(patience)) {}

  // In every turn of a wait; whether it must come again soon.
  bool advance_others() { return meanwhile_ != nullptr && meanwhile_->advance(); }

  // Of this color, in their new order; collective.
  std::vector<int> ranks_of(int color, int key);

 private:
  // What is not overridden goes through messages. `offsets` [size + 1] into `all`.
  virtual void do_all_reduce_sum(std::span<float> values);
  virtual void do_all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> offsets);
  virtual void do_broadcast(Bytes data, int root);
  virtual void do_barrier() { do_all_gather({}, {}, std::vector<int64_t>(size() + 1)); }
  virtual Request do_send(ConstBytes data, int to) = 0;
  virtual Request do_receive(Bytes data, int from) = 0;
  virtual bool do_test(Message& message) = 0;
  virtual bool do_wait_until(Message& message, TimePoint until) = 0;
  virtual bool do_advance() = 0;
  virtual void do_look() = 0;
  virtual std::unique_ptr<Communicator> do_split(int color, int key) = 0;
  virtual void do_abort(const std::string& reason) = 0;
  virtual void do_close() = 0;

  // Runs `body` as the only thread, and tells the other ranks when it fails.
  template <class Body>
  auto guarded(Body&& body);
  void check_peer(int peer) const;
  void do_wait(Message& message) { do_wait_until(message, kForever); }

  const int rank_;
  const std::vector<Member> members_;
  Patience patience_;
  std::atomic<bool> busy_ = false;
  bool closed_ = false;
  Communicator* meanwhile_ = nullptr;
  std::unique_ptr<Communicator> kept_;
};

// One rank by itself: nothing to do.
std::unique_ptr<Communicator> local_communicator(const std::string& host, Patience patience);

// The slice of `count` elements that is `index`'s, of `parts` that differ by one element at most.
constexpr int64_t slice_begin(int64_t count, int64_t index, int64_t parts) {
  return count / parts * index + (index < count % parts ? index : count % parts);
}

// out[i] = ((c[0][i] + c[1][i]) + c[2][i]) + …; `out` is none of them.
void sum_in_order(std::span<const float* const> contributions, int64_t count, float* out);

}  // namespace fastserve
