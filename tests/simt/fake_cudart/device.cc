#include "fake_cudart/device.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "common/check.h"
#include "fake_cudart/control.h"
#include "machine/machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fake_cudart {
namespace {

constexpr size_t kGuard = 1024;  // bytes around each allocation
constexpr size_t kAlignment = 512;
constexpr unsigned char kPoison = 0xff;
constexpr auto kOtherProcesses = std::chrono::microseconds(50);

// What is around an allocation: other bytes than around others, which a copy brings, and numbers that sums change.
const char* guard_of(uint64_t allocation) {
  constexpr size_t kKinds = 32;
  static const std::vector<char> bytes = [] {
    std::vector<char> made(kGuard + kKinds);
    simt::Random random(1);
    for (char& byte : made) byte = static_cast<char>(0xc0 | random.below(4));
    return made;
  }();
  return bytes.data() + allocation % kKinds;
}

thread_local bool in_host_function = false;
thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t checked(const char* function, const std::function<cudaError_t(Device&, Device::Lock&)>& body, Device& self,
                    Device::Lock& lock) {
  if (in_host_function) error(simt::join(function, " is called by a host function, which must not use CUDA"));
  if (self.found) std::rethrow_exception(std::exchange(self.found, nullptr));
  if (self.failing == function && self.calls_before_failing-- == 0) {
    self.failing.clear();
    self.lost = self.failing_lasts;
    if (self.lost) self.abandon();
    return last_error = self.lost ? cudaErrorLaunchFailure : cudaErrorUnknown;
  }
  self.progress(lock);
  const cudaError_t status = body(self, lock);
  self.progress(lock);
  if (status != cudaSuccess && status != cudaErrorNotReady) last_error = status;
  return status;
}

bool overlap(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }

}  // namespace

void error(const std::string& what) { throw fastserve::Error(what); }

int current_device() { return device_of_thread; }

Device& device() {
  static Device the_device;
  return the_device;
}

cudaError_t enter(const char* function, const std::function<cudaError_t(Device&, Device::Lock&)>& body) {
  Device& self = device();
  Device::Lock lock(self.mutex);
  if (self.lost) return last_error = cudaErrorLaunchFailure;
  try {
    return checked(function, body, self, lock);
  } catch (...) {
    self.abandon();
    throw;
  }
}

cudaError_t enter_quietly(const char* function, const std::function<cudaError_t(Device&, Device::Lock&)>& body) {
  Device& self = device();
  Device::Lock lock(self.mutex);
  const std::exception_ptr earlier = std::exchange(self.found, nullptr);
  cudaError_t status = cudaErrorUnknown;
  try {
    status = checked(function, body, self, lock);
  } catch (...) {
    self.found = std::current_exception();
  }
  if (earlier) self.found = earlier;
  return self.lost ? cudaErrorLaunchFailure : status;  // but what it frees is freed
}

std::string Operation::describe() const {
  if (actor == kHost) return task.name;
  return simt::join(task.name, " (operation ", number, " of stream ", actor, ')');
}

Device::Device() : numbers_(1, 0) {
  for (int i = 0; i < kDevices; ++i) default_streams[i] = make_stream(true, i);
  if (const char* named = std::getenv("FASTSERVE_SIMT_EAGERNESS"); named != nullptr) eagerness = parse_eagerness(named);
  if (const char* seed = std::getenv("FASTSERVE_SIMT_SEED"); seed != nullptr) random = simt::Random(std::stoull(seed));
  if (const char* bytes = std::getenv("FASTSERVE_SIMT_MEMORY"); bytes != nullptr) total_bytes = std::stoull(bytes);
}

// ---- memory

char* Device::allocate(Allocation::Place place, size_t bytes) {
  if (place == Allocation::Place::kDevice) {
    if (bytes > free_bytes(current_device())) return nullptr;
    used_bytes[current_device()] += bytes;
  }
  const size_t all = bytes + 2 * kGuard + kAlignment;
  std::unique_ptr<char[]> memory(new char[all]);
  std::memset(memory.get(), kPoison, all);
  const auto begin = reinterpret_cast<uintptr_t>(memory.get());
  char* base = memory.get() + ((begin + kGuard + kAlignment - 1) / kAlignment * kAlignment - begin);
  const uint64_t number = ++allocations_made_;
  for (char* guard : {base - kGuard, base + bytes}) {
    std::memcpy(guard, guard_of(number), kGuard);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(guard, kGuard);
#endif
  }
  allocations[base] = {place, current_device(), number, bytes, std::move(memory), {}};
  return base;
}

void Device::release(Allocation::Place place, void* memory) {
  const char* base = static_cast<const char*>(memory);
  const auto at = allocations.find(base);
  const char* function = place == Allocation::Place::kDevice ? "cudaFree" : "cudaFreeHost";
  if (at == allocations.end() || at->second.place != place) {
    error(simt::join(function, " of ", memory, ", which is not an allocation of that kind"));
  }
  check_guards(function);
  const auto touches = [&](const Operation& operation) {
    const auto within = [&](const char* p) { return p >= base && p < base + at->second.bytes; };
    return std::any_of(operation.task.ranges.begin(), operation.task.ranges.end(),
                       [&](const Range& range) { return within(range.begin); }) ||
           std::any_of(operation.task.mentioned.begin(), operation.task.mentioned.end(),
                       [&](const Mention& mention) { return within(mention.pointer); });
  };
  // Whether it has been carried out already is chance; what counts is whether the host can know.
  std::string user;
  for (const auto& operation : pending_) {
    if (operation->number > host[operation->actor] && touches(*operation)) user = operation->describe();
  }
  if (place == Allocation::Place::kDevice) used_bytes[at->second.device] -= at->second.bytes;
  if (!user.empty()) {
    at->second.memory.release();  // what is queued may still use it
    allocations.erase(at);
    error(simt::join(function, " of memory that is still used by ", user));
  }
  allocations.erase(at);
}

Allocation* Device::find(const void* address) {
  const char* at = static_cast<const char*>(address);
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return nullptr;
  --next;
  return at <= next->first + next->second.bytes ? &next->second : nullptr;
}

void Device::check_device(const std::string& name, const Allocation* allocation, int device) const {
  if (allocation == nullptr || allocation->place != Allocation::Place::kDevice || allocation->device == device) return;
  error(simt::join(name, " on device ", device, " uses memory of device ", allocation->device));
}

void Device::check_bounds(const std::string& name, const void* address, size_t bytes) {
  const char* at = static_cast<const char*>(address);
  for (const auto& [base, allocation] : allocations) {
    const bool inside = at >= base && at + bytes <= base + allocation.bytes;
    if (!inside && at < base + allocation.bytes && at + bytes > base) {
      error(simt::join(name, " goes from byte ", at - base, " to byte ", at + bytes - base, " of an allocation of ",
                       allocation.bytes, " bytes"));
    }
  }
}

void Device::check_guards([[maybe_unused]] const std::string& after) {
#if !defined(__SANITIZE_ADDRESS__)  // which tells of what is read there, too, at once
  for (const auto& [base, allocation] : allocations) {
    const char* intact = guard_of(allocation.number);
    const char* ends[] = {base - kGuard, base + allocation.bytes};
    for (const char* guard : ends) {
      if (std::memcmp(guard, intact, kGuard) == 0) continue;
      size_t i = 0;
      while (guard[i] == intact[i]) ++i;
      const ptrdiff_t where = guard + i - base;
      std::memcpy(const_cast<char*>(guard), intact, kGuard);
      error(simt::join(after, ": byte ", where, " of an allocation of ", allocation.bytes, " bytes was written"));
    }
  }
#endif
}

// ---- streams

CUstream_st* Device::stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_streams[current_device()];
  if (streams.count(handle) == 0) error("a stream that is not there, or not any more");
  return handle;
}

CUevent_st* Device::event(cudaEvent_t handle) {
  if (events.count(handle) == 0) error("an event that is not there, or not any more");
  return handle;
}

size_t Device::make_actor() {
  if (!idle_actors_.empty()) {
    const size_t actor = idle_actors_.back();
    idle_actors_.pop_back();
    return actor;
  }
  numbers_.push_back(0);
  return numbers_.size() - 1;
}

CUstream_st* Device::make_stream(bool blocking, int device) {
  auto* stream = new CUstream_st{make_actor(), device, blocking, nullptr, nullptr, 0, {}};
  streams.insert(stream);
  return stream;
}

void Device::destroy_stream(CUstream_st* stream) {
  // All that it did is over for everyone who asks from here on: its number in the clocks can be another's.
  if (numbers_[stream->actor] <= host[stream->actor]) idle_actors_.push_back(stream->actor);
  streams.erase(stream);
  delete stream;
}

std::shared_ptr<Operation> Device::enqueue(Task task, size_t actor, Clock clock,
                                           std::vector<std::shared_ptr<Operation>> after) {
  auto operation = std::make_shared<Operation>();
  operation->task = std::move(task);
  operation->actor = actor;
  operation->number = next_number(actor);
  operation->not_over_before = std::chrono::steady_clock::now() + latency;
  operation->clock = std::move(clock);
  operation->clock.set(actor, operation->number);
  after.erase(
      std::remove_if(after.begin(), after.end(),
                     [](const auto& before) { return before == nullptr || before->state == Operation::State::kDone; }),
      after.end());
  operation->after = std::move(after);
  check_races(*operation);
  std::erase_if(pending_, [this](const auto& other) {
    return other->state == Operation::State::kDone && other->number <= host[other->actor];
  });
  pending_.push_back(operation);
  return operation;
}

void Device::check_races(const Operation& operation) {
  for (const Range& range : operation.task.ranges) {
    Allocation* allocation = range.begin == range.end ? nullptr : find(range.begin);
    if (allocation == nullptr) continue;
    auto& accesses = allocation->accesses;
    std::erase_if(accesses, [this](const Access& access) { return access.number <= host[access.actor]; });
    for (const Access& access : accesses) {
      if (!overlap(access.range, range) || !(access.range.write || range.write)) continue;
      if (access.number <= operation.clock[access.actor]) continue;
      error(simt::join("race: ", access.name, access.range.write ? " writes" : " reads", " and ", operation.describe(),
                       range.write ? " writes" : " reads",
                       " the same bytes, and no event or synchronization puts one before the other"));
    }
  }
  for (const Range& range : operation.task.ranges) {
    Allocation* allocation = range.begin == range.end ? nullptr : find(range.begin);
    if (allocation == nullptr) continue;
    // A write that comes after an access to no other bytes stands for it from here on.
    std::erase_if(allocation->accesses, [&](const Access& access) {
      return range.write && access.range.begin >= range.begin && access.range.end <= range.end;
    });
    allocation->accesses.push_back({range, operation.actor, operation.number, operation.describe()});
  }
}

void Device::carry_out(Operation& operation, Lock& lock) {
  operation.state = Operation::State::kRunning;
  std::exception_ptr thrown;
  if (operation.task.is_host_function) lock.unlock();
  try {
    in_host_function = operation.task.is_host_function;
    if (operation.task.action) operation.task.action();
  } catch (...) {
    thrown = std::current_exception();
  }
  in_host_function = false;
  if (operation.task.is_host_function) lock.lock();
  operation.state = Operation::State::kDone;
  operation.task.action = nullptr;
  operation.task.ready = nullptr;
  operation.after.clear();
  operation.done_at = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  done_.notify_all();
  if (thrown) std::rethrow_exception(thrown);
}

void Device::finish(std::shared_ptr<Operation> operation, Lock& lock, bool wait) {
  std::vector<std::shared_ptr<Operation>> stack{std::move(operation)};
  while (!stack.empty()) {
    const std::shared_ptr<Operation> top = stack.back();
    if (top->state == Operation::State::kDone) {
      stack.pop_back();
    } else if (top->state == Operation::State::kRunning) {
      if (!wait) return;
      done_.wait(lock);
    } else {
      const size_t depth = stack.size();
      for (const auto& before : top->after) {
        if (before->state != Operation::State::kDone) stack.push_back(before);
      }
      if (stack.size() > depth) continue;
      if (!top->task.ready || top->task.ready()) {
        carry_out(*top, lock);
      } else if (wait) {
        done_.wait_for(lock, kOtherProcesses);
      } else {
        return;
      }
    }
  }
}

void Device::finish_all(Lock& lock) {
  const std::vector<std::shared_ptr<Operation>> all = pending_;
  for (const auto& operation : all) synchronize(operation, lock);
}

void Device::synchronize(const std::shared_ptr<Operation>& operation, Lock& lock) {
  if (operation == nullptr) return;
  finish(operation, lock);
  while (std::chrono::steady_clock::now() < operation->not_over_before) {
    done_.wait_until(lock, operation->not_over_before);
  }
  host.join(operation->clock);
}

void Device::abandon() {
  for (const auto& operation : pending_) {
    host.join(operation->clock);
    if (operation->state != Operation::State::kPending) continue;
    operation->state = Operation::State::kDone;
    operation->task.action = nullptr;
    operation->task.ready = nullptr;
    operation->after.clear();
  }
  for (CUstream_st* stream : streams) stream->capture = nullptr;
  captures.clear();
  done_.notify_all();
}

void Device::progress(Lock& lock) {
  if (eagerness == Eagerness::kLazy) return;
  std::vector<std::shared_ptr<Operation>> waiting;
  for (const auto& operation : pending_) {
    if (operation->state == Operation::State::kPending) waiting.push_back(operation);
  }
  if (eagerness == Eagerness::kEager) {
    for (const auto& operation : waiting) finish(operation, lock, false);
  } else if (!waiting.empty() && random.below(2) == 0) {
    finish(waiting[random.below(waiting.size())], lock, false);
  }
}

}  // namespace fake_cudart

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t status = std::exchange(fake_cudart::last_error, cudaSuccess);
  return fake_cudart::device().lost ? cudaErrorLaunchFailure : status;
}
cudaError_t cudaPeekAtLastError() { return fake_cudart::last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake_cudart::kDevices;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index >= fake_cudart::kDevices) return cudaErrorInvalidDevice;
  fake_cudart::device_of_thread = index;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* index) {
  *index = fake_cudart::current_device();
  return cudaSuccess;
}
}
