// Signals that a kernel's thread raises become Errors that name it.
#pragma once

#include <csignal>
#include <vector>

namespace simt {

// While it lives, wild addresses and the like in a kernel's thread end the kernel rather than the process.
class CaughtSignals {
 public:
  CaughtSignals();
  ~CaughtSignals();
  CaughtSignals(const CaughtSignals&) = delete;
  CaughtSignals& operator=(const CaughtSignals&) = delete;

 private:
  std::vector<char> stack_;
  stack_t previous_stack_{};
  struct sigaction previous_[4]{};
};

}  // namespace simt
