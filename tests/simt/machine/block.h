// The state of the block that runs now.
#pragma once

#include <cstddef>
#include <exception>
#include <string>
#include <vector>

#include "machine/fiber.h"
#include "machine/machine.h"
#include "machine/random.h"

namespace simt {

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  enum class State { kReady, kCollective, kBarrier, kExited };

  Context context;
  uint3 index;
  size_t warp;
  int lane;
  State state;
  Site site;  // where it waits
  const char* operation;
  std::vector<Copy> copies;         // not done, oldest first
  std::vector<size_t> copy_groups;  // sizes of the groups closed, oldest first; the rest of `copies` is open
};

// Lanes of a warp that wait for each other.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  const char* operation;
  Site site;
  size_t first;  // the thread that came first
  void* payloads[kLanes];
};

struct Warp {
  bool late;  // goes on when no other can
  unsigned alive;
  std::vector<Meeting> meetings;
};

class Block {
 public:
  void begin(const Launch& launch, const std::function<void()>& body, uint64_t seed);
  void run(uint3 index);
  // After an error no thread is taken up again.
  void end();

  // What the running thread calls.
  Thread* running() { return running_; }
  const Launch& launch() const { return *launch_; }
  void meet(const char* operation, unsigned mask, const Site& site, void* payload, Resolve resolve);
  bool barrier(const char* operation, const Site& site, bool predicate);
  unsigned char* shared() { return shared_.data() + shared_offset_; }
  [[noreturn]] void fault(const std::string& what);
  bool is_stack_guard(const void* address) const { return stacks_.is_guard(address); }

 private:
  static void thread_main();
  void exit_thread();
  void pause();  // lets others run
  void release(Thread& thread);
  void hold_back_late();
  std::string name(const Thread& thread) const;
  std::string where() const;
  void check_guards() const;
  [[noreturn]] void report_deadlock() const;

  const Launch* launch_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  Random random_{0};
  StackPool stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<size_t> ready_, round_;
  Context scheduler_;
  Thread* running_ = nullptr;
  size_t live_ = 0;  // threads that have not exited
  size_t at_barrier_ = 0;
  size_t first_at_barrier_ = 0;
  bool predicate_ = false, any_ = false;
  std::vector<unsigned char> shared_;  // guard, the block's memory, guard
  size_t shared_offset_ = 0;
  std::string error_;
  std::exception_ptr exception_;
};

// The machine has one, which keeps its stacks from kernel to kernel.
Block& block();

}  // namespace simt
