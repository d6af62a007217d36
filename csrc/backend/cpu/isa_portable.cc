// The kernels for SSE2 on x86-64, NEON on ARM, or whatever the compiler makes of its vectors; CMakeLists.txt sets the
// compiler flags.
#define FS_ISA portable
#include "backend/cpu/isa_table.h"

namespace fastserve::cpu {
const KernelTable kPortableKernels = FS_ISA::make_table("portable");
}
