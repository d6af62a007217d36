// The kernels for AVX2 with FMA; CMakeLists.txt sets the compiler flags.
#define FS_ISA avx2
#include "backend/cpu/isa_table.h"

namespace fastserve::cpu {
const KernelTable kAvx2Kernels = FS_ISA::make_table("avx2");
}
