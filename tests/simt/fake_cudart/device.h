// The state of the fake devices, of which there are two. Everything here is guarded by `mutex`.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fake_cudart/operation.h"
#include "machine/random.h"

namespace fake_cudart {

// An access that later ones must be ordered after, or not touch.
struct Access {
  Range range;
  size_t actor;
  uint64_t number;
  std::string name;
};

constexpr int kDevices = 2;
constexpr size_t kSharedByDefault = 48 * 1024;
// That the calling thread works on: 0 until it says otherwise.
int current_device();

struct Allocation {
  enum class Place { kDevice, kPinned };
  Place place;
  int device;       // whose memory it is, if it is a device's
  uint64_t number;  // tells it from what has its address later
  size_t bytes;
  std::unique_ptr<char[]> memory;  // with guards around
  std::vector<Access> accesses;    // those that the host does not know to be over
};

enum class Eagerness { kLazy, kRandom, kEager };  // control.h
Eagerness parse_eagerness(const std::string& name);

struct Graph;    // graph.h
struct Capture;  // graph.h

}  // namespace fake_cudart

struct CUstream_st {
  size_t actor;
  int device;
  bool blocking;  // waits for the default stream, and that for it
  std::shared_ptr<fake_cudart::Operation> last;
  std::shared_ptr<fake_cudart::Capture> capture;
  size_t branch = 0;           // of the capture
  std::vector<size_t> behind;  // nodes of the capture that the next one comes after
};

struct CUevent_st {
  int device;
  bool timed;
  std::shared_ptr<fake_cudart::Operation> recorded;
  std::shared_ptr<fake_cudart::Capture> capture;  // when it was recorded in one
  std::vector<size_t> behind;
};

namespace fake_cudart {

class Device {
 public:
  using Lock = std::unique_lock<std::mutex>;

  Device();

  std::mutex mutex;

  // ---- memory
  char* allocate(Allocation::Place place, size_t bytes);  // null: none left
  void release(Allocation::Place place, void* memory);
  Allocation* find(const void* address);  // null: the host's own memory
  // Throws when it is the memory of another device than this one, which has no way there.
  void check_device(const std::string& name, const Allocation* allocation, int device) const;
  // Throws unless it is the host's own or within one allocation.
  void check_bounds(const std::string& name, const void* address, size_t bytes);
  void check_guards(const std::string& after);
  size_t free_bytes(int device) const { return total_bytes - used_bytes[device]; }
  size_t total_bytes = size_t{512} << 20;  // of each device
  size_t used_bytes[kDevices] = {};

  // ---- streams
  CUstream_st* stream(cudaStream_t handle);  // throws for one that is not there
  CUevent_st* event(cudaEvent_t handle);
  CUstream_st* make_stream(bool blocking, int device);
  void destroy_stream(CUstream_st* stream);
  size_t make_actor();
  uint64_t next_number(size_t actor) { return ++numbers_[actor]; }

  // Queues it on the stream, or adds it to the graph that the stream is captured to; null then.
  std::shared_ptr<Operation> submit(CUstream_st* stream, Task task);
  // Queues an operation with this clock, which gets the actor's next number. Throws if it races with another.
  std::shared_ptr<Operation> enqueue(Task task, size_t actor, Clock clock,
                                     std::vector<std::shared_ptr<Operation>> after);
  // Carries out what it comes after and itself; unlocks for host functions. What waits for other processes is waited
  // for too, or, as where the host does not wait for the device, left where it is.
  void finish(std::shared_ptr<Operation> operation, Lock& lock, bool wait = true);
  void finish_all(Lock& lock);
  // The host waits for it.
  void synchronize(const std::shared_ptr<Operation>& operation, Lock& lock);
  // After an error nothing that is queued will be done, so that only the first one is told.
  void abandon();
  // Carries out something or nothing, as Eagerness says.
  void progress(Lock& lock);

  // The most shared memory that a launch of the kernel may ask for: what its attribute says, or what all may have.
  size_t shared_limit(const void* kernel, int device) const {
    const auto found = shared_limits.find({kernel, device});
    return found == shared_limits.end() ? kSharedByDefault : found->second;
  }
  std::map<std::pair<const void*, int>, size_t> shared_limits;
  size_t attributes_set = 0;
  size_t carveouts_set = 0;
  size_t cluster_launches = 0;
  int compiled_for = 90;  // virtual architecture of all kernels

  std::map<const char*, Allocation> allocations;
  std::set<CUstream_st*> streams;
  std::set<CUevent_st*> events;
  std::set<Graph*> graphs;
  std::set<void*> executables;
  std::set<Capture*> captures;  // under way
  CUstream_st* default_streams[kDevices];
  Clock host;
  simt::Random random{0};
  Eagerness eagerness = Eagerness::kLazy;
  std::exception_ptr found;  // by a call that cannot throw
  std::chrono::steady_clock::duration latency{0};
  std::string failing;  // a function, and how many of its calls come before the one that fails
  int calls_before_failing = 0;
  bool failing_lasts = false;  // and every call after it
  bool lost = false;           // a kernel has trapped, or the like: nothing works any more

 private:
  void check_races(const Operation& operation);
  void carry_out(Operation& operation, Lock& lock);

  std::vector<uint64_t> numbers_;  // of operations, by actor
  uint64_t allocations_made_ = 0;
  std::vector<size_t> idle_actors_;
  std::vector<std::shared_ptr<Operation>> pending_;
  std::condition_variable done_;
};

Device& device();

// Of every device, by FASTSERVE_SIMT_CAPABILITY.
struct Capability {
  int major, minor;
  size_t shared_bytes;  // that a block may ask for
};
const Capability& capability();

[[noreturn]] void error(const std::string& what);

// Every function of the API runs its body in one of these, which lock the device. What goes wrong is thrown...
cudaError_t enter(const char* function, const std::function<cudaError_t(Device&, Device::Lock&)>& body);
// ... or kept for the next call that can throw.
cudaError_t enter_quietly(const char* function, const std::function<cudaError_t(Device&, Device::Lock&)>& body);

}  // namespace fake_cudart
