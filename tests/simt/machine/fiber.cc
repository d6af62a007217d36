#include "machine/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "common/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what the calling convention lets a function rely on across a call, changes the stack, and takes it up there.
[[gnu::naked, gnu::noinline]] static void switch_stacks(void** /*save*/, void* /*load*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
#endif

namespace simt {
namespace {

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void switch_context(Context& from, Context& to, [[maybe_unused]] bool leaving) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void begin_context([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

StackPool::~StackPool() {
  for (char* stack : stacks_) munmap(stack - page(), kBytes + page());
}

char* StackPool::bottom(size_t index) {
  while (stacks_.size() <= index) {
    void* memory =
        mmap(nullptr, kBytes + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    FS_CHECK(memory != MAP_FAILED, "no memory for the stack of a kernel's thread: ", std::strerror(errno));
    FS_CHECK(mprotect(memory, page(), PROT_NONE) == 0, "cannot protect a stack: ", std::strerror(errno));
    stacks_.push_back(static_cast<char*>(memory) + page());
  }
  return stacks_[index];
}

bool StackPool::is_guard(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const char* stack : stacks_) {
    const auto bottom = reinterpret_cast<uintptr_t>(stack);
    if (at < bottom && at >= bottom - page()) return true;
  }
  return false;
}

void prepare(Context& context, char* stack, [[maybe_unused]] size_t stagger, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, StackPool::kBytes);  // what the last fiber here left behind
#endif
  context.fake_stack = nullptr;
  context.stack = stack;
  context.stack_bytes = StackPool::kBytes;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack + StackPool::kBytes - 128 - stagger % 16 * 192);
  *--top = nullptr;  // where entry() would return to; keeps its frame aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = StackPool::kBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

}  // namespace simt
