#include "common/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#include "common/check.h"
#include "common/pause.h"

namespace fastserve {

namespace {

constexpr uint64_t kOpen = uint64_t{1} << 32;
constexpr uint64_t kEpoch = uint64_t{1} << 33;
constexpr uint64_t kInside = kOpen - 1;
// How long a worker looks for the next loop before it parks: longer than the gaps inside an iteration, shorter than
// anybody would notice as idle load.
constexpr auto kSpinTime = std::chrono::microseconds(200);
constexpr int kSpinsPerClockRead = 64;

}  // namespace

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error& error) {
    const size_t started = workers_.size() + 1;
    stop();
    FS_CHECK(false, "the system grants ", started, " of ", threads, " threads: ", error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_erased(int64_t tasks, Invoke invoke, void* target) {
  tasks_ = tasks;
  invoke_ = invoke;
  target_ = target;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t epoch = (state_.load(std::memory_order_relaxed) / kEpoch + 1) * kEpoch;
  state_.store(epoch | kOpen);
  if (parked_.load() > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  drain(0);
  state_.fetch_and(~kOpen);
  for (int spins = 0; (state_.load(std::memory_order_acquire) & kInside) != 0; ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::drain(int thread) {
  for (;;) {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks_) return;
    invoke_(target_, task, thread);
  }
}

// Returns the state of an open loop newer than `last_epoch`, or 0 to stop.
uint64_t ThreadPool::wait_for_loop(uint64_t last_epoch) {
  const auto is_new = [&](uint64_t state) { return (state & kOpen) != 0 && state / kEpoch != last_epoch; };
  const auto spin_until = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsPerClockRead; ++i) {
      const uint64_t state = state_.load(std::memory_order_acquire);
      if (is_new(state)) return state;
      pause();
    }
  } while (std::chrono::steady_clock::now() < spin_until);

  std::unique_lock lock(mutex_);
  parked_.fetch_add(1);
  // Sequentially consistent with run_erased's store to state_ and load of parked_: one of the two sees the other.
  wake_.wait(lock, [&] { return stop_.load() || is_new(state_.load()); });
  parked_.fetch_sub(1);
  return stop_ ? 0 : state_.load();
}

void ThreadPool::work(int thread) {
  uint64_t last_epoch = 0;
  while (!stop_) {
    uint64_t state = wait_for_loop(last_epoch);
    if (state == 0) return;
    while ((state & kOpen) != 0) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
        last_epoch = state / kEpoch;
        drain(thread);
        state_.fetch_sub(1, std::memory_order_release);
        break;
      }
    }
  }
}

}  // namespace fastserve
