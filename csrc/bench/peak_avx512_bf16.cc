// CMakeLists.txt sets the compiler flags.
#include "bench/peak_kernels.h"

namespace fastserve::bench {
extern const Peak kAvx512Bf16Peak;
const Peak kAvx512Bf16Peak = make_peak("avx512_bf16");
}  // namespace fastserve::bench
