#include "comm/sender.h"

#include <system_error>
#include <utility>

#include "common/check.h"

namespace fastserve {

Sender::Sender(Communicator& communicator, int to, std::function<void(std::exception_ptr)> failed)
    : communicator_(communicator), to_(to), failed_(std::move(failed)) {
  try {
    thread_ = std::thread([this] { work(); });
  } catch (const std::system_error& error) {
    FS_CHECK(false, "the system grants no thread to send messages: ", error.what());
  }
}

Sender::~Sender() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  handed_in_.notify_all();
  thread_.join();
}

void Sender::send(Communicator::ConstBytes data) {
  {
    std::lock_guard lock(mutex_);
    check();
    if (queue_.empty()) {  // then the thread has nothing to do with the communicator, and is not woken for a short one
      Request request = communicator_.send(data, to_);
      if (communicator_.test(*request)) return;
      begun_ = std::move(request);
    }
    queue_.push_back(data);
  }
  handed_in_.notify_one();
}

void Sender::wait(size_t most) {
  std::unique_lock lock(mutex_);
  sent_.wait(lock, [&] { return failure_ || queue_.size() <= most; });
  check();
}

bool Sender::idle() const {
  std::lock_guard lock(mutex_);
  return queue_.empty();
}

void Sender::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    handed_in_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    Request request = std::exchange(begun_, nullptr);
    const Communicator::ConstBytes data = queue_.front();
    lock.unlock();
    std::exception_ptr failure;
    try {
      if (!request) request = communicator_.send(data, to_);
      communicator_.wait(*request);
    } catch (...) {
      failure = std::current_exception();
    }
    if (failure) failed_(failure);
    lock.lock();
    failure_ = failure;
    if (!failure) queue_.pop_front();
    sent_.notify_all();
    if (failure) return;
  }
}

}  // namespace fastserve
