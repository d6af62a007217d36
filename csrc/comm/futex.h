// Words that processes of one host park on.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace fastserve {

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, std::chrono::nanoseconds time) {
  const timespec limit{.tv_sec = 0, .tv_nsec = time.count()};
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, &limit, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

}  // namespace fastserve
