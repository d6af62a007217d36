// The state of the block, or the cluster of blocks, that runs now.
#pragma once

#include <cstddef>
#include <exception>
#include <string>
#include <vector>

#include "machine/barriers.h"
#include "machine/fiber.h"
#include "machine/machine.h"
#include "machine/random.h"
#include "machine/warpgroup.h"

namespace simt {

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  enum class State { kReady, kCollective, kBarrier, kShared, kExited };

  Context context;
  uint3 index, block;
  unsigned rank;  // of its block in the cluster
  size_t warp;    // in the cluster
  int lane;
  bool next_let, begun;  // has called let_next_begin(), wait_for_predecessor()
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
  size_t first;  // thread
  bool late;     // goes on when no other can
  unsigned alive;
  std::vector<Meeting> meetings;
  WarpProducts products;
};

// Where all of some threads wait for each other.
struct Gate {
  size_t arrived = 0, first = 0;
  bool predicate = false, any = false;
};

// A block of the cluster.
struct Member {
  size_t live;  // threads that have not exited
  Gate gate;
  std::vector<unsigned char> shared;  // guard, the block's memory, guard
  size_t shared_offset;
};

class Block {
 public:
  void begin(const Launch& launch, const std::function<void()>& body, uint64_t seed);
  void run(uint3 index);  // of the cluster's first block
  // After an error no thread is taken up again.
  void end();

  // What the running thread calls.
  Thread* running() { return running_; }
  const Launch& launch() const { return *launch_; }
  void meet(const char* operation, unsigned mask, const Site& site, void* payload, Resolve resolve);
  bool barrier(const char* operation, const Site& site, bool predicate);
  void cluster_barrier(const Site& site);
  void wait_for_shared(const char* operation, const Site& site);  // until somebody releases the thread
  void release(Thread& thread);
  unsigned char* shared() { return shared(running_->rank); }
  unsigned char* shared(unsigned rank) { return members_[rank].shared.data() + members_[rank].shared_offset; }
  unsigned members() const { return static_cast<unsigned>(members_.size()); }
  bool lives(unsigned rank) const { return members_[rank].live > 0; }
  Warp& warp() { return warps_[running_->warp]; }
  Warp& warp(size_t index) { return warps_[index]; }
  Transfers& transfers() { return transfers_; }
  std::string where() const;
  [[noreturn]] void fault(const std::string& what);
  bool is_stack_guard(const void* address) const { return stacks_.is_guard(address); }

 private:
  static void thread_main();
  void exit_thread();
  void pause();  // lets others run
  void hold_a_member();
  void pass(Gate& gate, size_t threads, size_t first, const char* operation, const Site& site);
  void hold_back_late();
  std::string name(const Thread& thread) const;
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
  size_t count_ = 0;  // threads of a block
  size_t live_ = 0;   // threads of the cluster that have not exited
  std::vector<Member> members_;
  Gate cluster_gate_;
  unsigned held_ = 0;  // the member that stands still, if there is one of that rank, for ...
  uint64_t held_rounds_ = 0;
  Transfers transfers_;
  std::string error_;
  std::exception_ptr exception_;
};

// The machine has one, which keeps its stacks from kernel to kernel.
Block& block();

}  // namespace simt
