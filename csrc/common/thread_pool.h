// A persistent pool that runs short parallel loops, thousands a second.
//
// Workers spin briefly for the next loop, then park. A loop does not wait for workers that never joined it, so a
// descheduled thread costs its help and not its time slice.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace fastserve {

class ThreadPool {
 public:
  // `threads` counts the caller of run(); 0 means one a core. Throws when the system refuses a thread.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) for every task in [0, tasks), in any order, on any thread; thread < size(). Returns when
  // all are done. Bodies must not throw. One caller at a time.
  template <class Body>
  void run(int64_t tasks, Body&& body) {
    if (tasks <= 1 || workers_.empty()) {
      for (int64_t task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    using Target = std::remove_reference_t<Body>;
    run_erased(
        tasks, [](void* target, int64_t task, int thread) { (*static_cast<Target*>(target))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Invoke = void (*)(void*, int64_t, int);

  void run_erased(int64_t tasks, Invoke invoke, void* target);
  void work(int thread);
  void drain(int thread);
  void stop();
  uint64_t wait_for_loop(uint64_t last_epoch);

  // The loop being run. Written by the caller while it is closed and nobody is inside.
  int64_t tasks_ = 0;
  Invoke invoke_ = nullptr;
  void* target_ = nullptr;
  alignas(64) std::atomic<int64_t> next_{0};
  // Bits 63..33: epoch; bit 32: open for joining; bits 31..0: workers inside.
  alignas(64) std::atomic<uint64_t> state_{0};

  alignas(64) std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace fastserve
