#include "backend/cuda/trial_failure.h"

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

void recover_from_trial(cudaStream_t stream, const char* tried, const std::exception& error, const char* setting) {
  static_cast<void>(cudaGetLastError());
  cudaError_t status = cudaStreamSynchronize(stream);
  if (status == cudaSuccess) status = cudaGetLastError();
  FS_CHECK(status == cudaSuccess, "the device does not work any more after a trial of ", tried, " (", error.what(),
           "); start again with ", setting);
}

}  // namespace fastserve::cuda
