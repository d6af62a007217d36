// The device that a runtime works on.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace fastserve {

// `device`: cpu, or cuda, which is device 0 of those that this process sees, or cuda:1 and so on. `dtype` is what
// models are computed in there, `threads` the host's threads that work for it; 0: one a core. Throws when the device,
// or what it takes to use it, is not there.
std::unique_ptr<Backend> make_backend(const std::string& device, DType dtype, int threads);

// Bytes of one KV block there.
int64_t block_bytes(const std::string& device, const KvShape& shape);

// What the plugin of the CUDA backend exports under kMakeCudaBackendSymbol.
using MakeCudaBackend = Backend* (*)(DType dtype, int device);
inline constexpr char kMakeCudaBackendSymbol[] = "fastserve_make_cuda_backend";

}  // namespace fastserve
