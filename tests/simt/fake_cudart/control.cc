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
  self.failing_lasts = false;
}

void lose_device(const char* function, int after) {
  fail_call(function, after);
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.failing_lasts = true;
}

void revive() {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.lost = false;
  self.failing.clear();
}

void set_compiled_for(int architecture) {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  self.compiled_for = architecture;
}

size_t attributes_set() {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  return self.attributes_set;
}

size_t carveouts_set() {
  Device& self = device();
  const Device::Lock lock(self.mutex);
  return self.carveouts_set;
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

extern "C" {
// For tests of a whole backend, which have nothing but the plugin.
__attribute__((visibility("default"))) void fastserve_simt_fail_call(const char* function, int after) {
  fake_cudart::fail_call(function, after);
}
__attribute__((visibility("default"))) void fastserve_simt_set_latency(double seconds) {
  fake_cudart::set_latency(seconds);
}
__attribute__((visibility("default"))) void fastserve_simt_set_memory(size_t bytes) {
  fake_cudart::set_device_memory(bytes);
}
}
