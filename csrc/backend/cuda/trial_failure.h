// When a trial of what devices may not do has thrown.
#pragma once

#include <cuda_runtime_api.h>

#include <exception>

namespace fastserve::cuda {

// Leaves no error behind, for others to come upon. Throws Error where the device's error lasts, as a kernel's that has
// trapped does, which ends the process's use of the device: it says what was `tried`, that it failed with `error`, and
// that `setting`, a variable of the environment and its value, does without. Waits for the stream.
void recover_from_trial(cudaStream_t stream, const char* tried, const std::exception& error, const char* setting);

}  // namespace fastserve::cuda
