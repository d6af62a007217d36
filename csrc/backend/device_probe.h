// What a device that is not the host reaches at its best, for benchmarks to compare with, and when its batches ran.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace fastserve {

// Operations a second of one product of activations [m, k] and 16-bit weights [n, k] by every way that a device has,
// the weights from its memory; NaN by a way that it does not have or must not take. `wide`: outputs are float32.
struct ProductRates {
  double warps, warpgroups;  // the best of our kernels of either kind
  double library;            // as the library likes it best, whatever its bits
  std::string taken;         // which of them a backend takes for it
};

// When the kernels of one batch ran, in seconds of the device's clock since the first batch began.
struct BatchSpan {
  double begin, end;
};

class DeviceProbe {
 public:
  enum class Transfer { kToHost, kToDevice, kBoth };

  virtual ~DeviceProbe() = default;

  // One sample of each. Bytes a second that plain copies within the device's memory read and write, both counted; ...
  virtual double copy_rate() = 0;
  // ... operations a second of a square product of `size` in 16-bit floats, as gemm_library() computes it; ...
  virtual double gemm_rate(int64_t size) = 0;
  virtual std::string gemm_library() = 0;
  // ... of a product by every way there is, and whether products by warpgroups are admitted, or why not (`gated`: what
  // is taken if outputs meet, which the other ways are timed without); ...
  virtual ProductRates product_rates(int64_t m, int64_t n, int64_t k, bool wide, bool gated) = 0;
  virtual std::string warpgroups() = 0;
  // ... and bytes a second between pinned host memory and the device's, of both directions together.
  virtual double transfer_rate(Transfer transfer) = 0;

  // From now on, times the batches that backends of this device run; `most` of them, the later ones are not seen.
  virtual void time_batches(int64_t most) = 0;
  // Those since then, in order; ends it. No batch may be under way.
  virtual std::vector<BatchSpan> take_times() = 0;
};

// `bytes` is how much copies and transfers move at a time. Throws where the device, or what it takes to use it, is not
// there, and for the host.
std::unique_ptr<DeviceProbe> make_device_probe(const std::string& device, DType dtype, int64_t bytes);

// What the plugin of the CUDA backend exports under kMakeCudaProbeSymbol.
using MakeCudaProbe = DeviceProbe* (*)(DType dtype, int64_t bytes, int device);
inline constexpr char kMakeCudaProbeSymbol[] = "fastserve_make_cuda_probe";

}  // namespace fastserve
