// Chooses the instruction set at run time.
#include <cstdlib>
#include <string>

#include "backend/cpu/kernels.h"
#include "common/check.h"

namespace fastserve::cpu {

std::vector<const KernelTable*> supported_kernels() {
  std::vector<const KernelTable*> supported;
#ifdef FS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) supported.push_back(&kAvx512Bf16Kernels);
  if (avx512) supported.push_back(&kAvx512Kernels);
  if (avx2) supported.push_back(&kAvx2Kernels);
#endif
  supported.push_back(&kPortableKernels);
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
