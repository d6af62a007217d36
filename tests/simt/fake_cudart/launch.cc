#include "fake_cudart/launch.h"

#include <cstdint>
#include <cstring>

#include "fake_cudart/device.h"

namespace fake_cudart {
namespace {

thread_local std::vector<Range> next_ranges;

// Pointers into allocations of the device among the arguments' bytes.
std::vector<const char*> pointers(Device& self, const void* arguments, size_t bytes) {
  std::vector<const char*> found;
  for (size_t i = 0; i + sizeof(void*) <= bytes; i += sizeof(void*)) {
    const char* pointer;
    std::memcpy(&pointer, static_cast<const char*>(arguments) + i, sizeof(void*));
    if (self.find(pointer) != nullptr) found.push_back(pointer);
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
  if (launch.shared_bytes > simt::kMaxShared) {
    error(simt::join(name, " asks for ", launch.shared_bytes, " bytes of shared memory; there are ", simt::kMaxShared));
  }
}

}  // namespace

void launch(const simt::Launch& configuration, std::function<void()> body, const void* arguments, size_t bytes,
            cudaStream_t handle) {
  enter("a launch", [&](Device& self, Device::Lock&) {
    check_configuration(configuration);
    Task task;
    task.name = "the kernel launched at " + simt::describe(configuration.where);
    task.ranges = std::exchange(next_ranges, {});
    task.mentioned = pointers(self, arguments, bytes);
    task.action = [&self, configuration, body = std::move(body), name = task.name] {
      simt::Launch launch = configuration;
      launch.is_device_memory = is_device_memory;
      simt::run(launch, body, self.random.next());
      self.check_guards(name);
    };
    self.submit(self.stream(handle), std::move(task));
    return cudaSuccess;
  });
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
