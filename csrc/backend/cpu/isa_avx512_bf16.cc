// The kernels for AVX-512 with dot products of bfloat16 and of int8 (VNNI); CMakeLists.txt sets the compiler flags.
#define FS_ISA avx512_bf16
#include "backend/cpu/isa_table.h"

namespace fastserve::cpu {
const KernelTable kAvx512Bf16Kernels = FS_ISA::make_table("avx512_bf16");
}
