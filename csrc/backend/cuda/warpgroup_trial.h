// Whether products may be computed by matrix instructions of warpgroups (gemm_warpgroup.cuh): only where a device has
// them and their bits are those of the other kernels, which no manual promises.
#pragma once

#include <string>

#include "backend/cuda/gemm_plan.h"
#include "backend/cuda/product_trial.h"

namespace fastserve::cuda {

// Products of fewer rows are other kernels' affair.
constexpr int64_t kLeastWarpgroupRows = 128;

struct WarpgroupTrial {
  bool admitted;
  std::string verdict;  // for a log
};

// Tries the kernels on random operands on the calling thread's device, once for it and the type in a process: later
// calls return the first one's verdict. From then on gemm() may choose them. Waits for the stream, which must not be
// recorded meanwhile; `workspace` is that of gemm(). FASTSERVE_WGMMA=0: refuses without a try.
// Throws where the trial has left the device unusable (trial_failure.h).
const WarpgroupTrial& try_warpgroups(DType dtype, void* workspace, cudaStream_t stream);

// What try_warpgroups() found on the calling thread's device; false before.
bool warpgroups_admitted(DType dtype);

// Whether the calling thread's device has the instructions.
bool has_warpgroups();

// The trial itself, of what is to stand for one of the kernels of warpgroups.
using WarpgroupProduct = std::function<bool(GemmKernel, const GemmCall&, cudaStream_t)>;
WarpgroupTrial compare_warpgroups(DType dtype, void* workspace, cudaStream_t stream, const WarpgroupProduct& product);

}  // namespace fastserve::cuda
