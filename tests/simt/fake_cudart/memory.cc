#include <cstring>
#include <exception>

#include "fake_cudart/graph.h"
#include "machine/machine.h"

using fake_cudart::Allocation;
using fake_cudart::Device;
using fake_cudart::enter;
using fake_cudart::enter_quietly;
using fake_cudart::error;
using fake_cudart::Task;

namespace {

using Place = Allocation::Place;

// Rows of bytes. A copy that is not of a matrix has one.
struct Rows {
  char* first;
  size_t pitch;
  size_t width;
  size_t count;

  char* row(size_t i) const { return first + i * pitch; }
};

void add_ranges(Task& task, const Rows& rows, bool write) {
  for (size_t i = 0; i < rows.count; ++i) task.ranges.push_back({rows.row(i), rows.row(i) + rows.width, write});
}

void check_rows(Device& self, const char* function, const Rows& rows) {
  if (rows.count > 1 && rows.pitch < rows.width) error(simt::join(function, ": rows overlap"));
  self.check_bounds(function, rows.first, (rows.count - 1) * rows.pitch + rows.width);
}

const char* name(cudaMemcpyKind kind) {
  switch (kind) {
    case cudaMemcpyHostToHost:
      return "host to host";
    case cudaMemcpyHostToDevice:
      return "host to device";
    case cudaMemcpyDeviceToHost:
      return "device to host";
    case cudaMemcpyDeviceToDevice:
      return "device to device";
    default:
      return "between any";
  }
}

cudaError_t copy(Device& self, Device::Lock& lock, const char* function, const Rows& to, const Rows& from,
                 cudaMemcpyKind kind, CUstream_st* stream, bool waits) {
  if (to.width == 0 || to.count == 0) return cudaSuccess;
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  const Allocation* target = self.find(to.first);
  const Allocation* source = self.find(from.first);
  const auto on_device = [](const Allocation* allocation) {
    return allocation != nullptr && allocation->place == Place::kDevice;
  };
  if (kind != cudaMemcpyDefault) {
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_device != on_device(target) || from_device != on_device(source)) {
      error(simt::join(function, " (", name(kind), ") from ", on_device(source) ? "device" : "host", " to ",
                       on_device(target) ? "device" : "host", " memory"));
    }
  }
  for (const Allocation* allocation : {target, source}) self.check_device(function, allocation, stream->device);
  check_rows(self, function, to);
  check_rows(self, function, from);
  if (!waits && (target == nullptr || source == nullptr)) {
    error(simt::join(function, " with memory of the host that is not pinned, which would wait or run late"));
  }
  Task task;
  task.name = simt::join(function, " of ", to.width * to.count, " bytes, ", name(kind));
  add_ranges(task, to, true);
  if (waits && source == nullptr && on_device(target)) {
    // From pageable memory to the device's, who calls is waited for only until the bytes have been taken over (CUDA
    // Runtime API, "API synchronization behavior"): other streams need not see them yet.
    const auto staged = std::make_shared<std::vector<char>>();
    for (size_t i = 0; i < from.count; ++i) staged->insert(staged->end(), from.row(i), from.row(i) + from.width);
    task.action = [to, staged] {
      for (size_t i = 0; i < to.count; ++i) std::memcpy(to.row(i), staged->data() + i * to.width, to.width);
    };
    self.submit(stream, std::move(task));
    return cudaSuccess;
  }
  add_ranges(task, from, false);
  task.action = [to, from] {
    for (size_t i = 0; i < to.count; ++i) std::memmove(to.row(i), from.row(i), to.width);
  };
  const auto operation = self.submit(stream, std::move(task));
  if (waits) self.synchronize(operation, lock);
  return cudaSuccess;
}

Rows one(const void* memory, size_t bytes) { return {static_cast<char*>(const_cast<void*>(memory)), bytes, bytes, 1}; }

cudaError_t set(Device& self, const char* function, void* memory, int value, size_t bytes, CUstream_st* stream) {
  if (bytes == 0) return cudaSuccess;
  const Allocation* allocation = self.find(memory);
  if (allocation == nullptr) error(simt::join(function, " of memory that is not the device's"));
  self.check_device(function, allocation, stream->device);
  const Rows rows = one(memory, bytes);
  check_rows(self, function, rows);
  Task task;
  task.name = simt::join(function, " of ", bytes, " bytes");
  add_ranges(task, rows, true);
  task.action = [memory, value, bytes] { std::memset(memory, value, bytes); };
  self.submit(stream, std::move(task));
  return cudaSuccess;
}

cudaError_t allocate(const char* function, Place place, void** memory, size_t bytes) {
  return enter(function, [&](Device& self, Device::Lock&) {
    fake_cudart::check_allowed_in_captures(self, function);
    *memory = nullptr;
    if (bytes == 0) return cudaSuccess;
    *memory = self.allocate(place, bytes);
    return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
  });
}

cudaError_t release(const char* function, Place place, void* memory) {
  return enter_quietly(function, [&](Device& self, Device::Lock& lock) {
    if (memory == nullptr) return cudaSuccess;
    // Destructors that an exception calls cannot wait for what was queued before it. The real function does.
    if (std::uncaught_exceptions() > 0) {
      self.finish_all(lock);
    } else {
      fake_cudart::check_allowed_in_captures(self, function);
    }
    self.release(place, memory);
    return cudaSuccess;
  });
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** memory, size_t bytes) { return allocate("cudaMalloc", Place::kDevice, memory, bytes); }
cudaError_t cudaFree(void* memory) { return release("cudaFree", Place::kDevice, memory); }

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return allocate("cudaHostAlloc", Place::kPinned, memory, bytes);
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  return allocate("cudaMallocHost", Place::kPinned, memory, bytes);
}
cudaError_t cudaFreeHost(void* memory) { return release("cudaFreeHost", Place::kPinned, memory); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return enter("cudaMemcpy", [&](Device& self, Device::Lock& lock) {
    fake_cudart::check_allowed_in_captures(self, "cudaMemcpy");
    return copy(self, lock, "cudaMemcpy", one(to, bytes), one(from, bytes), kind, self.stream(nullptr), true);
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
  return enter("cudaMemcpyAsync", [&](Device& self, Device::Lock& lock) {
    return copy(self, lock, "cudaMemcpyAsync", one(to, bytes), one(from, bytes), kind, self.stream(handle), false);
  });
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  return enter("cudaMemcpy2D", [&](Device& self, Device::Lock& lock) {
    fake_cudart::check_allowed_in_captures(self, "cudaMemcpy2D");
    if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
    return copy(self, lock, "cudaMemcpy2D", {static_cast<char*>(to), to_pitch, width, height},
                {static_cast<char*>(const_cast<void*>(from)), from_pitch, width, height}, kind, self.stream(nullptr),
                true);
  });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t handle) {
  return enter("cudaMemcpy2DAsync", [&](Device& self, Device::Lock& lock) {
    if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
    return copy(self, lock, "cudaMemcpy2DAsync", {static_cast<char*>(to), to_pitch, width, height},
                {static_cast<char*>(const_cast<void*>(from)), from_pitch, width, height}, kind, self.stream(handle),
                false);
  });
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  return enter("cudaMemset", [&](Device& self, Device::Lock&) {
    fake_cudart::check_allowed_in_captures(self, "cudaMemset");
    return set(self, "cudaMemset", memory, value, bytes, self.stream(nullptr));
  });
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t handle) {
  return enter("cudaMemsetAsync", [&](Device& self, Device::Lock&) {
    return set(self, "cudaMemsetAsync", memory, value, bytes, self.stream(handle));
  });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return enter("cudaMemGetInfo", [&](Device& self, Device::Lock&) {
    *free = self.free_bytes(fake_cudart::current_device());
    *total = self.total_bytes;
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  return enter("cudaPointerGetAttributes", [&](Device& self, Device::Lock&) {
    const Allocation* allocation = self.find(memory);
    void* address = const_cast<void*>(memory);
    *attributes = {};
    attributes->type = allocation == nullptr                 ? cudaMemoryTypeUnregistered
                       : allocation->place == Place::kDevice ? cudaMemoryTypeDevice
                                                             : cudaMemoryTypeHost;
    attributes->devicePointer = allocation == nullptr ? nullptr : address;
    attributes->hostPointer = allocation != nullptr && allocation->place == Place::kDevice ? nullptr : address;
    return cudaSuccess;
  });
}
}
