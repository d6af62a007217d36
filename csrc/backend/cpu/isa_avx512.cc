// The kernels for AVX-512 F, BW, DQ, VL; CMakeLists.txt sets the compiler flags.
#define FS_ISA avx512
#include "backend/cpu/isa_table.h"

namespace fastserve::cpu {
const KernelTable kAvx512Kernels = FS_ISA::make_table("avx512");
}
