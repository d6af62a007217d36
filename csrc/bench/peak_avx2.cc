// CMakeLists.txt sets the compiler flags.
#include "bench/peak_kernels.h"

namespace fastserve::bench {
extern const Peak kAvx2Peak;
const Peak kAvx2Peak = make_peak("avx2");
}  // namespace fastserve::bench
