// Products by NVIDIA's own library where it is installed, as the bound to compare ours with. It is looked for when it
// is asked for: nothing is linked with it, and its headers are not needed.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstdint>
#include <memory>
#include <string>

namespace fastserve::cuda {

class ReferenceProducts {
 public:
  // Null where the library is not to be found: libcublasLt.so.13 or .12, where the loader looks (LD_LIBRARY_PATH).
  static std::unique_ptr<ReferenceProducts> open();
  virtual ~ReferenceProducts() = default;

  virtual std::string name() const = 0;
  // Prepares products output[m, n] = input[m, k] · weight[n, k]ᵀ of row-major matrices of `type`, sums in float32.
  // Throws when the library has none.
  virtual void prepare(int64_t m, int64_t n, int64_t k, cudaDataType_t type) = 0;
  // Queues one of those.
  virtual void run(const void* input, const void* weight, void* output, cudaStream_t stream) = 0;
};

}  // namespace fastserve::cuda
