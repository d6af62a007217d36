// A flow of control with a stack of its own. One kernel thread is one fiber; all fibers of a block take turns on the
// host thread that runs the kernel.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// Where a flow of control can be taken up again.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers{};
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

// Goes on at `to`, and returns when something switches back to `from`. With `leaving`, nothing ever will.
void switch_context(Context& from, Context& to, bool leaving = false);

// The first thing that entry() does; `from` is what switched to it.
void begin_context(Context& from);

// Stacks, each with a page below that faults. Kept from one kernel to the next.
class StackPool {
 public:
  static constexpr size_t kBytes = 64 * 1024;

  ~StackPool();
  char* bottom(size_t index);  // of stack `index`, kBytes large
  bool is_guard(const void* address) const;

 private:
  std::vector<char*> stacks_;
};

// Makes `context` one that calls entry() on the stack when it is switched to; entry never returns. `stagger` sets
// stacks off against each other, so that equal frames do not compete for the same lines of the cache.
void prepare(Context& context, char* stack, size_t stagger, void (*entry)());

}  // namespace simt
