// Chooses the instruction set at run time.
#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(FS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "backend/cpu/kernels.h"
#include "common/check.h"

namespace fastserve::cpu {

#ifdef FS_X86
namespace {

// Whether the processor has tiles, the system lets this process use them, and they compute what they should.
bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, …)
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  if (amx_works()) return true;
  std::fprintf(stderr,
               "fastserve: this machine's AMX computes wrong products; going on without it. Please report it.\n");
#endif
  return false;
}

}  // namespace
#endif

std::vector<const KernelTable*> supported_kernels() {
  std::vector<const KernelTable*> supported;
#ifdef FS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  static const bool amx = bf16 && has_amx();
  if (amx) supported.push_back(&kAmxKernels);
  if (bf16) supported.push_back(&kAvx512Bf16Kernels);
  if (avx512) supported.push_back(&kAvx512Kernels);
  if (avx2) supported.push_back(&kAvx2Kernels);
#endif
  supported.push_back(&kPortableKernels);
#ifdef FS_X86
  if (bf16) supported.push_back(&kAmxEmulatedKernels);
#endif
  return supported;
}

const KernelTable& select_kernels() {
  const auto supported = supported_kernels();
  const char* wanted = std::getenv("FASTSERVE_ISA");
  if (wanted == nullptr || *wanted == '\0') return *supported.front();
  std::string names;
  for (const KernelTable* table : supported) {
    if (std::string(wanted) == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  FS_CHECK(false, "FASTSERVE_ISA is '", wanted, "'; this machine runs: ", names);
  return *supported.front();
}

}  // namespace fastserve::cpu
