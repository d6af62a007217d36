#include "fake_cudart/launch.h"

#include <cstdint>
#include <cstring>

#include "backend/cuda/runtime_api.h"
#include "fake_cudart/device.h"

namespace fake_cudart {
namespace {

constexpr unsigned kMaxCluster = 8;

thread_local std::vector<Range> next_ranges;

// Pointers into allocations among the arguments' bytes. Throws for memory of another device.
std::vector<Mention> pointers(Device& self, const std::string& name, const void* arguments, size_t bytes, int device) {
  std::vector<Mention> found;
  for (size_t i = 0; i + sizeof(void*) <= bytes; i += sizeof(void*)) {
    const char* pointer;
    std::memcpy(&pointer, static_cast<const char*>(arguments) + i, sizeof(void*));
    const Allocation* allocation = self.find(pointer);
    if (allocation == nullptr) continue;
    self.check_device(name, allocation, device);
    found.push_back({pointer, allocation->number});
  }
  return found;
}

bool is_device_memory(const void* address, size_t bytes) {
  const Allocation* allocation = device().find(address);
  if (allocation == nullptr) return false;
  const auto next = device().allocations.upper_bound(static_cast<const char*>(address));
  const char* base = std::prev(next)->first;
  return static_cast<const char*>(address) + bytes <= base + allocation->bytes;
}

void check_configuration(const simt::Launch& launch) {
  const std::string name = "the kernel launched at " + simt::describe(launch.where);
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > simt::kMaxThreads || launch.block.z > 64) {
    error(simt::join(name, " has blocks of ", threads, " threads; 1 to ", simt::kMaxThreads, " are possible"));
  }
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || launch.grid.x > 0x7fffffffu ||
      launch.grid.y > 65535 || launch.grid.z > 65535) {
    error(simt::join(name, " has a grid of (", launch.grid.x, ", ", launch.grid.y, ", ", launch.grid.z,
                     "); (2^31 - 1, 65535, 65535) is the most and (1, 1, 1) the least"));
  }
  if (launch.cluster == 0 || launch.cluster > kMaxCluster || launch.grid.x % launch.cluster != 0) {
    error(simt::join(name, " has clusters of ", launch.cluster, " blocks in a grid of ", launch.grid.x, "; 1 to ",
                     kMaxCluster, " are possible, and must divide the grid"));
  }
  if (launch.cluster > 1 && capability().major < 9) {
    error(simt::join(name, " has clusters, which compute capability 9.0 is the first to have"));
  }
  if (launch.shared_bytes > capability().shared_bytes) {
    error(simt::join(name, " asks for ", launch.shared_bytes, " bytes of shared memory; there are ",
                     capability().shared_bytes));
  }
}

}  // namespace

void launch(const void* function, const simt::Launch& configuration, std::function<void()> body, const void* arguments,
            size_t bytes, cudaStream_t handle) {
  const cudaError_t status = enter("a launch", [&](Device& self, Device::Lock&) {
    check_configuration(configuration);
    self.cluster_launches += configuration.cluster > 1 ? 1 : 0;
    Task task;
    task.name = "the kernel launched at " + simt::describe(configuration.where);
    task.ranges = std::exchange(next_ranges, {});
    CUstream_st* stream = self.stream(handle);
    if (stream->device != current_device()) {
      error(simt::join(task.name, " goes to a stream of device ", stream->device, ", and the thread is on device ",
                       current_device()));
    }
    if (configuration.shared_bytes > self.shared_limit(function, stream->device)) {
      error(simt::join(task.name, " asks for ", configuration.shared_bytes,
                       " bytes of shared memory, more than its attribute allows"));
    }
    task.mentioned = pointers(self, task.name, arguments, bytes, stream->device);
    task.action = [&self, configuration, body = std::move(body), name = task.name] {
      simt::Launch launch = configuration;
      launch.is_device_memory = is_device_memory;
      simt::run(launch, body, self.random.next());
      self.check_guards(name);
    };
    self.submit(stream, std::move(task));
    return cudaSuccess;
  });
  fastserve::cuda::check(status);
}

void next_launch_reads(const void* memory, size_t bytes) {
  const char* begin = static_cast<const char*>(memory);
  next_ranges.push_back({begin, begin + bytes, false});
}

void next_launch_writes(const void* memory, size_t bytes) {
  const char* begin = static_cast<const char*>(memory);
  next_ranges.push_back({begin, begin + bytes, true});
}

}  // namespace fake_cudart
