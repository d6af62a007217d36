// A thread that waits in the driver, where nothing else can wake it, so that others wait for an event beside other
// things, or for so long, without a core being busy with it.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace fastserve::cuda {

class EventWatch {
 public:
  explicit EventWatch(int device) : device_(device) {}
  ~EventWatch() { stop(); }
  EventWatch(const EventWatch&) = delete;
  EventWatch& operator=(const EventWatch&) = delete;

  // Calls `over` on the thread when the event has passed, or never will: whoever synchronizes with it is told why. One
  // event at a time, which is recorded again or destroyed only after a join().
  void start(cudaEvent_t event, std::function<void()> over);
  bool busy() const;
  // Until the event is over and `over` has been called, or for so long.
  void wait_for(std::chrono::nanoseconds most);
  // Until then. Throws what the driver threw, if anything; it returns errors, but a stand-in for it may throw.
  void join();
  // The end of the thread, when the event is over.
  void stop();

 private:
  void work();

  const int device_;
  mutable std::mutex mutex_;
  std::condition_variable started_, over_;
  cudaEvent_t event_ = nullptr;  // null: not busy
  std::function<void()> call_;
  std::exception_ptr thrown_;
  bool stop_ = false;
  std::thread thread_;  // from the first event on
};

}  // namespace fastserve::cuda
