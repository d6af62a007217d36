// CMakeLists.txt sets the compiler flags.
#include "bench/peak_kernels.h"

namespace fastserve::bench {
extern const Peak kAvx512Peak;
const Peak kAvx512Peak = make_peak("avx512");
}  // namespace fastserve::bench
