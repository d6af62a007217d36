// The CPU as a device: splits every operation over a thread pool and hands the pieces to the kernels of the
// instruction set.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace fastserve {

// threads: 0 means one a core. Throws when FASTSERVE_ISA names an instruction set this machine lacks.
std::unique_ptr<Backend> make_cpu_backend(int threads);

}  // namespace fastserve
