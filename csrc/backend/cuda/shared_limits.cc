#include "backend/cuda/shared_limits.h"

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

namespace {
constexpr size_t kAlways = 48 * 1024;  // bytes that every kernel may have
}

void allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= kAlways) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  most = bytes;
}

void prefer_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> told;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (told.contains({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  told.insert({kernel, device});
}

}  // namespace fastserve::cuda
