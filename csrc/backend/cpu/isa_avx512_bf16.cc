// The kernels for AVX-512 with bfloat16 dot products; CMakeLists.txt sets the compiler flags.
#define FS_ISA avx512_bf16
#include "backend/cpu/isa_table.h"

namespace fastserve::cpu {
const KernelTable kAvx512Bf16Kernels = FS_ISA::make_table("avx512_bf16");
}
