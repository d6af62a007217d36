#include "backend/cuda/event_watch.h"

#include <utility>

#include "common/check.h"

namespace fastserve::cuda {

void EventWatch::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  started_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void EventWatch::start(cudaEvent_t event, std::function<void()> over) {
  {
    std::lock_guard lock(mutex_);
    FS_CHECK(event_ == nullptr, "an event is watched while another is");
    event_ = event;
    call_ = std::move(over);
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  }
  started_.notify_one();
}

bool EventWatch::busy() const {
  std::lock_guard lock(mutex_);
  return event_ != nullptr;
}

void EventWatch::wait_for(std::chrono::nanoseconds most) {
  std::unique_lock lock(mutex_);
  over_.wait_for(lock, most, [&] { return event_ == nullptr; });
}

void EventWatch::join() {
  std::unique_lock lock(mutex_);
  over_.wait(lock, [&] { return event_ == nullptr; });
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
}

void EventWatch::work() {
  static_cast<void>(cudaSetDevice(device_));
  std::unique_lock lock(mutex_);
  for (;;) {
    started_.wait(lock, [&] { return stop_ || event_ != nullptr; });
    if (event_ == nullptr) return;
    const cudaEvent_t event = event_;
    lock.unlock();
    std::exception_ptr thrown;
    try {
      static_cast<void>(cudaEventSynchronize(event));
    } catch (...) {
      thrown = std::current_exception();
    }
    if (call_) call_();
    lock.lock();
    thrown_ = thrown;
    event_ = nullptr;
    over_.notify_all();
  }
}

}  // namespace fastserve::cuda
