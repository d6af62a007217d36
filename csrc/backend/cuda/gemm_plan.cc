#include "backend/cuda/gemm_plan.h"

#include <algorithm>
#include <array>

#include "backend/cuda/kernels.h"
#include "backend/cuda/quantized_layout.h"

namespace fastserve::cuda {

namespace {

// Of an H200, whose ratios other devices share well enough.
constexpr double kMemoryBytes = 4.4e6;  // per microsecond, as a kernel reaches it
constexpr double kCacheBytes = 5.5e6;   // from the L2 cache to all multiprocessors
constexpr double kProducts = 180e6;  // multiply-adds per microsecond, of all multiprocessors, by mma instructions ...
constexpr double kGroupProducts = 330e6;  // ... and by those of warpgroups
constexpr double kStart = 2.0;            // microseconds until the copies flow, and after they end
constexpr double kMeeting = 2.0;          // until the parts of a split product are added

double weight_bytes(WeightFormat format) {
  if (!is_quantized(format)) return 2.0;
  return (unit_bytes(format) + unit_scale_bytes(format)) / static_cast<double>(kUnitOutputs * kSlab);
}

}  // namespace

int64_t gemm_tiles(GemmKernel kernel, const GemmShape& shape) {
  return ceil_div(shape.m, geometry(kernel).rows) * ceil_div(shape.n, geometry(kernel).columns);
}

int64_t gemm_workspace_needed(GemmKernel kernel, const GemmShape& shape) {
  const GemmGeometry& g = geometry(kernel);
  if (!g.split) return 0;
  return kGemmCounterBytes +
         gemm_tiles(kernel, shape) * kGemmParts * g.rows * g.columns * static_cast<int64_t>(sizeof(float));
}

int64_t gemm_shared_bytes(GemmKernel kernel, WeightFormat format) {
  const GemmGeometry& g = geometry(kernel);
  if (g.way == GemmGeometry::Way::kWarpgroup) {  // the ring, its barriers, and what aligns it
    const int64_t pattern = 8 * kSlab * 2, stage = (kWarpgroupRows + g.columns) * kSlab * 2 + 2 * sizeof(uint64_t);
    return pattern + stages_of(kernel, format) * stage;
  }
  const int64_t units = g.columns / kUnitOutputs;
  const int64_t weights =
      is_quantized(format) ? units * (unit_bytes(format) + unit_scale_bytes(format)) : units * kUnitOutputs * kSlab * 2;
  const int64_t ring = stages_of(kernel, format) * (g.rows * kSlab * 2 + weights);
  return g.way == GemmGeometry::Way::kRows ? kGemmParts * round_up(ring, 128) : ring;
}

bool can_run(GemmKernel kernel, const GemmShape& shape, const GemmDevice& device, int64_t workspace_bytes) {
  const bool warpgroups = geometry(kernel).way == GemmGeometry::Way::kWarpgroup;
  if (warpgroups && (!device.warpgroups || is_quantized(shape.format))) return false;
  if (gemm_shared_bytes(kernel, shape.format) > device.shared_bytes) return false;
  if (!geometry(kernel).split) return true;
  return gemm_workspace_needed(kernel, shape) <= workspace_bytes &&
         gemm_tiles(kernel, shape) * static_cast<int64_t>(sizeof(unsigned)) <= kGemmCounterBytes;
}

double gemm_cost(GemmKernel kernel, const GemmShape& shape, const GemmDevice& device) {
  const GemmGeometry& g = geometry(kernel);
  const int64_t down = ceil_div(shape.m, g.rows), across = ceil_div(shape.n, g.columns);
  const double k = static_cast<double>(shape.k_padded), n = static_cast<double>(shape.n);
  const double weights = n * k * weight_bytes(shape.format), rows = static_cast<double>(shape.m) * k * 2.0;
  const double parts = g.split ? 2.0 * kGemmParts * static_cast<double>(down * across * g.rows * g.columns) * 4.0 : 0.0;
  const double memory = (weights + rows) / kMemoryBytes;
  const double cache = (static_cast<double>(down) * weights + static_cast<double>(across) * rows + parts) / kCacheBytes;
  const bool warpgroups = g.way == GemmGeometry::Way::kWarpgroup;
  const double products = static_cast<double>(down * g.rows) * static_cast<double>(across * g.columns) * k /
                          (warpgroups ? kGroupProducts : kProducts);
  // The last of the multiprocessors has this many blocks, the average fewer.
  const int64_t blocks = down * across * (g.split ? kGemmParts : warpgroups ? kWarpgroupBlocks : 1);
  const double balance =
      static_cast<double>(ceil_div(blocks, device.processors) * device.processors) / static_cast<double>(blocks);
  return std::max({memory, cache, products}) * balance + kStart + (g.split ? kMeeting : 0.0);
}

GemmKernel choose_gemm(const GemmShape& shape, const GemmDevice& device, int64_t workspace_bytes) {
  GemmKernel best = GemmKernel::kRows8;
  double least = -1.0;
  for (int i = 0; i < kGemmKernels; ++i) {
    const auto kernel = static_cast<GemmKernel>(i);
    if (!can_run(kernel, shape, device, workspace_bytes)) continue;
    const double cost = gemm_cost(kernel, shape, device);
    if (least < 0.0 || cost < least) {
      best = kernel;
      least = cost;
    }
  }
  FS_CHECK(least >= 0.0, "no kernel for matrix products fits in the ", device.shared_bytes,
           " bytes of shared memory that this device gives a block");
  return best;
}

}  // namespace fastserve::cuda
