#include "machine/faults.h"

#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "machine/block.h"

namespace simt {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

void on_signal(int number, siginfo_t* info, void*) {
  if (block().running() == nullptr) {  // not a kernel's doing: let it be what it would have been
    struct sigaction ordinary{};
    ordinary.sa_handler = SIG_DFL;
    sigaction(number, &ordinary, nullptr);
    return;
  }
  if (number == SIGFPE) block().fault("divides an integer by zero");
  if (number == SIGILL) block().fault("comes to what cannot be reached");
  if (block().is_stack_guard(info->si_addr)) block().fault("has too many or too large local variables");
  if (info->si_code == SI_KERNEL) block().fault("accesses a misaligned address, or one that cannot be");
  block().fault(join("accesses memory that is not there, at ", info->si_addr));
}

}  // namespace

CaughtSignals::CaughtSignals() : stack_(64 * 1024) {
#if !defined(__SANITIZE_ADDRESS__)
  stack_t stack{};
  stack.ss_sp = stack_.data();
  stack.ss_size = stack_.size();
  sigaltstack(&stack, &previous_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  // The handler leaves by a switch of stacks, so the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous_[i]);
#endif
}

CaughtSignals::~CaughtSignals() {
#if !defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous_[i], nullptr);
  sigaltstack(&previous_stack_, nullptr);
#endif
}

}  // namespace simt

// With -fsanitize=alignment,bounds,shift the compiler calls these where a kernel breaks C++'s own rules. (The kernels
// are compiled with it and not linked with the sanitizer's library.)
#if !defined(__SANITIZE_ADDRESS__)
namespace {

struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

[[noreturn]] void report(const SourceLocation& at, const std::string& what) {
  const std::string text = simt::join(what, " at ", simt::short_path(at.file), ':', at.line);
  if (simt::block().running() == nullptr) throw fastserve::Error(text);
  simt::block().fault(text);
}

}  // namespace

extern "C" {

struct TypeMismatchData {
  SourceLocation at;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatchData* data, uintptr_t address) {
  report(data->at, simt::join("wants an address that is a multiple of ", 1 << data->log_alignment, ", got ",
                              reinterpret_cast<void*>(address)));
}
struct LocationFirst {
  SourceLocation at;
};
void __ubsan_handle_out_of_bounds(LocationFirst* data, uintptr_t) {
  report(data->at, "has an index out of an array's bounds");
}
void __ubsan_handle_shift_out_of_bounds(LocationFirst* data, uintptr_t, uintptr_t) {
  report(data->at, "shifts by more bits than there are");
}
}
#endif
