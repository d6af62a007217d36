// What the devices say of themselves: alike, and where nothing else is asked for of compute capability 9.0.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fake_cudart/device.h"
#include "machine/machine.h"

using fake_cudart::capability;
using fake_cudart::Device;
using fake_cudart::enter;

namespace {

// With the most shared memory of a block, by CUDA's programming guide.
constexpr fake_cudart::Capability kCapabilities[] = {
    {7, 5, 64 * 1024}, {8, 0, 163 * 1024}, {8, 6, 99 * 1024}, {8, 9, 99 * 1024}, {9, 0, simt::kMaxShared}};

fake_cudart::Capability asked_for() {
  const char* named = std::getenv("FASTSERVE_SIMT_CAPABILITY");
  if (named == nullptr) return kCapabilities[std::size(kCapabilities) - 1];
  std::string known;
  for (const auto& each : kCapabilities) {
    const std::string name = simt::join(each.major, '.', each.minor);
    if (name == named) return each;
    known += ' ' + name;
  }
  fake_cudart::error(simt::join("FASTSERVE_SIMT_CAPABILITY is ", named, "; emulated are", known));
}

constexpr int kProcessors = 132;
constexpr int kSharedPerProcessor = 228 * 1024;
constexpr int kL2 = 256 * 1024;  // small, so that little is more than fits

struct Name {
  cudaError_t status;
  const char* name;
  const char* text;
};

constexpr Name kNames[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const Name& find(cudaError_t status) {
  static constexpr Name kUnknown{cudaErrorUnknown, "unrecognized error code", "unrecognized error code"};
  for (const Name& name : kNames) {
    if (name.status == status) return name;
  }
  return kUnknown;
}

bool is_device(int index) { return index >= 0 && index < fake_cudart::kDevices; }

// NVIDIA's libraries know nothing of an emulated device, so the backend must not come upon one: tests name stand-ins.
const int kNoLibraries = setenv("FASTSERVE_CUBLASLT", "0", 0);

}  // namespace

const fake_cudart::Capability& fake_cudart::capability() {
  static const Capability the_capability = asked_for();
  return the_capability;
}

extern "C" {

const char* cudaGetErrorName(cudaError_t status) { return find(status).name; }
const char* cudaGetErrorString(cudaError_t status) { return find(status).text; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  return enter("cudaGetDeviceProperties", [&](Device& self, Device::Lock&) {
    if (!is_device(index)) return cudaErrorInvalidDevice;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "emulated CUDA device");
    const char* named = std::getenv("FASTSERVE_SIMT_DEVICE");  // else each process has devices of its own
    const int identity[] = {named != nullptr ? std::atoi(named) : static_cast<int>(getpid()), index};
    std::memcpy(properties->uuid.bytes, identity, sizeof identity);
    properties->totalGlobalMem = self.total_bytes;
    properties->sharedMemPerBlock = fake_cudart::kSharedByDefault;
    properties->sharedMemPerBlockOptin = capability().shared_bytes;
    properties->sharedMemPerMultiprocessor = kSharedPerProcessor;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = simt::kLanes;
    properties->maxThreadsPerBlock = simt::kMaxThreads;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 0x7fffffff;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->major = capability().major;
    properties->minor = capability().minor;
    properties->multiProcessorCount = kProcessors;
    properties->l2CacheSize = kL2;
    properties->asyncEngineCount = 2;
    properties->concurrentKernels = 1;
    properties->unifiedAddressing = 1;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (!is_device(index)) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = simt::kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = fake_cudart::kSharedByDefault;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(capability().shared_bytes);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedPerProcessor;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = simt::kLanes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kProcessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = kL2;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability().minor;
      return cudaSuccess;
    case cudaDevAttrAsyncEngineCount:
      *value = 2;
      return cudaSuccess;
    default:
      fake_cudart::error(simt::join("cudaDeviceGetAttribute: the emulated device does not know attribute ",
                                    static_cast<int>(attribute)));
  }
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return enter("cudaFuncSetAttribute", [&](Device& self, Device::Lock&) {
    if (function == nullptr) return cudaErrorInvalidValue;
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
      if (value < cudaSharedmemCarveoutDefault || value > cudaSharedmemCarveoutMaxShared) return cudaErrorInvalidValue;
      self.carveouts_set += value == cudaSharedmemCarveoutMaxShared ? 1 : 0;
      return cudaSuccess;
    }
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > capability().shared_bytes) return cudaErrorInvalidValue;
    self.shared_limits[{function, fake_cudart::current_device()}] = static_cast<size_t>(value);
    ++self.attributes_set;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return enter("cudaFuncGetAttributes", [&](Device& self, Device::Lock&) {
    if (function == nullptr) return cudaErrorInvalidDeviceFunction;
    *attributes = {};
    attributes->maxThreadsPerBlock = simt::kMaxThreads;
    attributes->maxDynamicSharedSizeBytes =
        static_cast<int>(self.shared_limit(function, fake_cudart::current_device()));
    attributes->ptxVersion = self.compiled_for;
    attributes->binaryVersion = 90;  // the devices' own, whatever it was made from
    return cudaSuccess;
  });
}
}
