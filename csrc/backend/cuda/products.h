// How the backend multiplies: by whose kernel, and what becomes of the outputs after it.
#pragma once

#include <memory>

#include "backend/backend.h"
#include "backend/cuda/cublaslt.h"
#include "backend/cuda/matrix.h"
#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

// The products of one backend, in its stream.
class Products {
 public:
  Products(DType dtype, const Stream& stream) : dtype_(dtype), stream_(stream) {}

  // Backend::gemm. The first product of a matrix, and the first of many rows, wait for trials: they cannot be recorded.
  void run(const GemmArgs& args);

 private:
  void try_warpgroups_once();
  const CublasShape* find_theirs(const GemmCall& call);

  const DType dtype_;
  const Stream& stream_;
  Memory workspace_{Place::kDevice, kGemmWorkspace};
  bool tried_warpgroups_ = false;
  bool sought_cublas_ = false;
  std::unique_ptr<CublasLt> cublas_;
};

}  // namespace fastserve::cuda
