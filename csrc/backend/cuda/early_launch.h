// Kernels that begin before the one before them has ended (programmatic dependent launch, compute capability 9.0 and
// later).
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace fastserve::cuda {

// Whether launches with LaunchConfig::early are made so on the calling thread's device; false until
// try_early_launches().
bool kernels_begin_early();

// Whether they may be: where the device has them, and kernels that depend on each other, launched so and replayed from
// a graph, give what they should. Once for a device in a process; later calls return the first one's verdict, a line
// for a log. FASTSERVE_PDL=0: not. The stream must not be recorded, and is waited for. Throws where the trial has left
// the device unusable (trial_failure.h).
const std::string& try_early_launches(cudaStream_t stream);

// The trial itself, whose outcome kernels_begin_early() tells from then on.
std::string early_launch_trial(cudaStream_t stream);

}  // namespace fastserve::cuda
