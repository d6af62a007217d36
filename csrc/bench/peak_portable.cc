// CMakeLists.txt sets the compiler flags.
#include "bench/peak_kernels.h"

namespace fastserve::bench {
extern const Peak kPortablePeak;
const Peak kPortablePeak = make_peak("portable");
}  // namespace fastserve::bench
