#include "backend/cuda/warpgroup_trial.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/quantized_layout.h"
#include "backend/cuda/trial_failure.h"

namespace fastserve::cuda {

namespace {

constexpr GemmKernel kTried[] = {GemmKernel::kWarpgroup128, GemmKernel::kWarpgroup192};
constexpr int kMostDevices = 64;

// By device and type, for whoever only asks.
std::atomic<bool> admitted[kMostDevices][2];

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

struct Shape {
  int64_t n, k;
  std::vector<int64_t> rows;
};

// Tails of every kind: of tiles, of rows, of parts that are shorter than others or empty. And one whose weights just
// fit in the device's cache, so that all of the device works.
std::vector<Shape> shapes() {
  const double cache = attribute(cudaDevAttrL2CacheSize) / 2.0;  // elements
  const int64_t side = static_cast<int64_t>(std::sqrt(cache)) / kPad * kPad;
  return {{200, 320, {1, 129, 257}}, {kPad, kPad, {64}}, {side + 8, side, {side / 4 + 77}}};
}

}  // namespace

bool has_warpgroups() {
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

WarpgroupTrial compare_warpgroups(DType dtype, void* workspace, cudaStream_t stream, const WarpgroupProduct& product) {
  const auto refused = [](const auto&... parts) {
    std::ostringstream text;
    (text << "not used: " << ... << parts);
    return WarpgroupTrial{false, text.str()};
  };
  try {
    for (const Shape& shape : shapes()) {
      for (const bool wide : {false, true}) {
        const int64_t most = *std::ranges::max_element(shape.rows);
        ProductTrials trials(dtype, shape.n, shape.k, wide, most, workspace, stream, nullptr);
        for (const GemmKernel kernel : kTried) {
          const auto tried = [&](const GemmCall& call, cudaStream_t queue) { return product(kernel, call, queue); };
          for (const int64_t rows : shape.rows) {
            if (!wide && rows != most) continue;  // the same sums
            if (trials.has_our_bits(rows, false, tried) && (!wide || trials.has_our_bits(rows, true, tried))) continue;
            return refused(geometry(kernel).name, " has other bits for ", rows, " rows by [", shape.n, ", ", shape.k,
                           "]");
          }
        }
      }
    }
  } catch (const std::exception& error) {  // of a launch, or of memory
    recover_from_trial(stream, "products by warpgroups", error, "FASTSERVE_WGMMA=0");
    return refused(error.what());
  }
  return {true, "admitted: all bits are those of the other kernels"};
}

const WarpgroupTrial& try_warpgroups(DType dtype, void* workspace, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, DType>, WarpgroupTrial> tried;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  if (const auto found = tried.find({device, dtype}); found != tried.end()) return found->second;
  WarpgroupTrial trial;
  const char* wanted = std::getenv("FASTSERVE_WGMMA");
  if (wanted != nullptr && std::string(wanted) == "0") {
    trial = {false, "not used: FASTSERVE_WGMMA is 0"};
  } else if (!has_warpgroups()) {
    trial = {false, "not used: the device's compute capability is not 9.0"};
  } else {
    trial =
        compare_warpgroups(dtype, workspace, stream, [](GemmKernel kernel, const GemmCall& call, cudaStream_t queue) {
          gemm_with(kernel, call, queue);
          return true;
        });
  }
  if (device < kMostDevices) admitted[device][dtype == DType::kBFloat16 ? 0 : 1] = trial.admitted;
  if (is_set("FASTSERVE_DEBUG")) {
    std::fprintf(stderr, "products by warpgroups (wgmma) in %s: %s\n",
                 dtype == DType::kBFloat16 ? "bfloat16" : "float16", trial.verdict.c_str());
  }
  return tried.emplace(std::pair{device, dtype}, std::move(trial)).first->second;
}

bool warpgroups_admitted(DType dtype) {
  const int device = current_device();
  return device < kMostDevices && admitted[device][dtype == DType::kBFloat16 ? 0 : 1];
}

}  // namespace fastserve::cuda
