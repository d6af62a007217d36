#include "fake_cudart/control.h"

#include <algorithm>
#include <chrono>

#include "common/check.h"
#include "fake_cudart/device.h"

namespace fake_cudart {

Eagerness parse_eagerness(const std::string& name) {
  if (name == "lazy") return Eagerness::kLazy;
  if (name == "random") return Eagerness::kRandom;
  if (name == "eager") return Eagerness::kEager;
  throw fastserve::Error("eagerness must be lazy, random or eager, got '" + name + "'");
}

void configure(const std::string& eagerness, uint64_t seed) {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.eagerness = parse_eagerness(eagerness);
  self.random = simt::Random(seed);
}

void set_device_memory(size_t bytes) {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.total_bytes = std::max(bytes, *std::ranges::max_element(self.used_bytes));
}

void check_errors() {
  enter("check_errors", [](Device& self, Device::Lock&) {
    self.check_guards("check_errors");
    return cudaSuccess;
  });
}

void set_latency(double seconds) {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.latency = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(seconds));
}

void fail_call(const char* function, int after) {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.failing = function == nullptr ? "" : function;
  self.calls_before_failing = after;
}

size_t attributes_set() {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  return self.attributes_set;
}

size_t cluster_launches() {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  return self.cluster_launches;
}

size_t live_objects() {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  return self.allocations.size() + self.streams.size() - kDevices + self.events.size() + self.graphs.size() +
         self.executables.size();
}

}  // namespace fake_cudart
