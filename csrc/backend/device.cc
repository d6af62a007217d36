#include "backend/device.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string_view>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kv_layout.h"
#include "backend/cuda/kv_layout.h"
#include "backend/device_probe.h"
#include "common/check.h"

namespace fastserve {

namespace {

// The plugin lies beside this module; the variable names another, such as the one that tests emulate a device with.
std::string plugin_path() {
  const char* named = std::getenv("FASTSERVE_CUDA_PLUGIN");
  if (named != nullptr && *named != '\0') return named;
  Dl_info here = {};
  FS_CHECK(dladdr(reinterpret_cast<const void*>(&make_backend), &here) != 0, "cannot tell where FastServe is");
  const std::string module = here.dli_fname;
  return module.substr(0, module.rfind('/') + 1) + "_cuda.so";
}

void* load_from_plugin(const char* symbol) {
  const std::string plugin = plugin_path();
  void* library = dlopen(plugin.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) {
    const std::string reason = dlerror();
    FS_CHECK(false, "the CUDA backend cannot be used: ", reason,
             ". It is built where nvcc and a driver are, or with FASTSERVE_CUDA=ON in the environment; or use the CPU");
  }
  void* found = dlsym(library, symbol);
  FS_CHECK(found != nullptr, plugin, " is not FastServe's CUDA backend");
  return found;
}

constexpr std::string_view kCudaNumber = "cuda:";

bool is_cuda(const std::string& device) {
  if (!device.starts_with(kCudaNumber)) return device == "cuda";
  const std::string number = device.substr(kCudaNumber.size());
  return !number.empty() && number.size() < 4 && number.find_first_not_of("0123456789") == std::string::npos;
}

int cuda_number(const std::string& device) {
  return device == "cuda" ? 0 : std::stoi(device.substr(kCudaNumber.size()));
}

void check_cpu(const std::string& device) {
  FS_CHECK(device == "cpu", "a device must be cpu, cuda or one such as cuda:1, got '", device, "'");
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, DType dtype, int threads) {
  if (is_cuda(device)) {
    static const auto make = reinterpret_cast<MakeCudaBackend>(load_from_plugin(kMakeCudaBackendSymbol));
    return std::unique_ptr<Backend>(make(dtype, cuda_number(device)));
  }
  check_cpu(device);
  FS_CHECK(dtype != DType::kFloat16, "the CPU does not compute in float16: use bfloat16 or float32");
  return make_cpu_backend(threads);
}

std::unique_ptr<DeviceProbe> make_device_probe(const std::string& device, DType dtype, int64_t bytes) {
  FS_CHECK(is_cuda(device), "a device to be measured must be cuda or one such as cuda:1, got '", device, "'");
  static const auto make = reinterpret_cast<MakeCudaProbe>(load_from_plugin(kMakeCudaProbeSymbol));
  return std::unique_ptr<DeviceProbe>(make(dtype, bytes, cuda_number(device)));
}

int64_t block_bytes(const std::string& device, const KvShape& shape) {
  if (is_cuda(device)) return cuda::layout_of(shape).block_bytes();
  check_cpu(device);
  return cpu::layout_of(shape).block_bytes();
}

}  // namespace fastserve
