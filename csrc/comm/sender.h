// Sends messages from one rank to another on a thread of its own, so that long ones move while whoever handed them in
// does something else.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "comm/communicator.h"

namespace fastserve {

class Sender {
 public:
  // Nobody else may use `communicator`, but to abort it. `failed` is called at most once, on the thread, with what
  // ended the sending. Throws when the system refuses a thread.
  Sender(Communicator& communicator, int to, std::function<void(std::exception_ptr)> failed);
  // While messages are on their way, the communicator has to be aborted first.
  ~Sender();
  Sender(const Sender&) = delete;
  Sender& operator=(const Sender&) = delete;

  // The memory has to stay as it is until the message is sent. One that goes at once is, when this returns. Throws what
  // ended the sending, as does wait().
  void send(Communicator::ConstBytes data);
  // Until at most so many of the messages are still on their way.
  void wait(size_t most);
  bool idle() const;

 private:
  void work();
  void check() const {
    if (failure_) std::rethrow_exception(failure_);
  }

  Communicator& communicator_;
  const int to_;
  const std::function<void(std::exception_ptr)> failed_;

  mutable std::mutex mutex_;
  std::condition_variable handed_in_, sent_;
  std::deque<Communicator::ConstBytes> queue_;  // the first is being sent
  Request begun_;                               // the first, where it was begun when it was handed in
  std::exception_ptr failure_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace fastserve
