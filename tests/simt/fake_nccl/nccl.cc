// A stand-in for libnccl.so.2 between processes of one host, whose streams are the fake runtime's. Like the real one it
// does not notice that a process is gone, waits for ever then, and does things in its own time where it may.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "backend/cuda/nccl_library.h"
#include "fake_cudart/device.h"
#include "fake_nccl/room.h"
#include "machine/machine.h"

using fake_cudart::Device;
using fake_cudart::Task;
using fake_nccl::Room;
using fake_nccl::Slot;
using fastserve::cuda::nccl::Config;
using fastserve::cuda::nccl::kFloat32;
using fastserve::cuda::nccl::kInProgress;
using fastserve::cuda::nccl::kSuccess;
using fastserve::cuda::nccl::Result;
using fastserve::cuda::nccl::UniqueId;

namespace {

constexpr Result kInvalidArgument = 4, kInvalidUsage = 5;

struct State {
  State(const std::string& name, int size, int rank) : room(name, size), size(size), rank(rank) {}

  Room room;
  const int size, rank;
  std::atomic<bool> aborted = false;
  bool connected = false;
  uint64_t gathered = 0;  // operations that were carried out
  uint64_t sent[fake_nccl::kMaxRanks] = {}, received[fake_nccl::kMaxRanks] = {};
  int turns = 1;  // how often it has to be asked until what was begun is done
};

void fill(Slot& slot, const void* data, size_t bytes) {
  slot.bytes = bytes;
  std::memcpy(slot.data, data, bytes);
  slot.filled.fetch_add(1);
}

void empty(Slot& slot, void* data, size_t bytes) {
  if (slot.bytes != bytes)
    fake_cudart::error(simt::join("NCCL: ", slot.bytes, " bytes come where ", bytes, " are due"));
  std::memcpy(data, slot.data, bytes);
  slot.emptied.fetch_add(1);
}

}  // namespace

struct ncclComm {
  std::shared_ptr<State> state;
};

namespace {

// Queues steps, each of which waits until it may be done.
class Steps {
 public:
  Steps(ncclComm* comm, const char* name, cudaStream_t stream) : state_(comm->state), name_(name), stream_(stream) {}

  template <class Ready, class Action>
  void add(const void* memory, size_t bytes, bool write, Ready ready, Action action) {
    fake_cudart::enter(name_, [&](Device& self, Device::Lock&) {
      self.check_bounds(name_, memory, bytes);
      const char* begin = static_cast<const char*>(memory);
      Task task;
      task.name = name_;
      task.ranges = {{begin, begin + bytes, write}};
      task.ready = [state = state_, ready] { return state->aborted || ready(*state); };
      task.action = [state = state_, action] {
        if (!state->aborted) action(*state);
      };
      self.submit(self.stream(stream_), std::move(task));
      return cudaSuccess;
    });
  }

 private:
  const std::shared_ptr<State> state_;
  const char* const name_;
  const cudaStream_t stream_;
};

Result check(const ncclComm* comm, size_t count, int type) {
  if (comm == nullptr || type != kFloat32 || count * sizeof(float) > fake_nccl::kMaxBytes) return kInvalidArgument;
  return comm->state->turns > 0 || !comm->state->room.complete() ? kInvalidUsage : kSuccess;
}

// The first operation of a communicator connects it.
Result connect(ncclComm* comm) {
  if (std::exchange(comm->state->connected, true)) return kSuccess;
  comm->state->turns = 2;
  return kInProgress;
}

bool always(const State&) { return true; }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* ncclGetErrorString(Result result) { return result == kInvalidUsage ? "invalid usage" : "invalid"; }

EXPORTED Result ncclGetVersion(int* version) {
  *version = 22703;
  return kSuccess;
}

EXPORTED Result ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> made = 0;
  const std::string name = simt::join("/fastserve-nccl-", getpid(), '-', made.fetch_add(1));
  std::memset(id->bytes, 0, sizeof id->bytes);
  name.copy(id->bytes, sizeof id->bytes - 1);
  return kSuccess;
}

EXPORTED Result ncclCommInitRankConfig(ncclComm** comm, int size, UniqueId id, int rank, Config* config) {
  const bool known = config->size == sizeof(Config) && config->magic == 0xcafebeef && config->blocking == 0;
  if (!known || size > fake_nccl::kMaxRanks || rank < 0 || rank >= size) return kInvalidArgument;
  *comm = new ncclComm{std::make_shared<State>(id.bytes, size, rank)};
  return kInProgress;
}

EXPORTED Result ncclCommGetAsyncError(ncclComm* comm, Result* result) {
  State& state = *comm->state;
  if (state.room.complete() && state.turns > 0) --state.turns;
  *result = state.room.complete() && state.turns == 0 ? kSuccess : kInProgress;
  return kSuccess;
}

EXPORTED Result ncclCommFinalize(ncclComm* comm) {
  comm->state->turns = 2;
  return kInProgress;
}

EXPORTED Result ncclCommDestroy(ncclComm* comm) {
  delete comm;
  return kSuccess;
}

EXPORTED Result ncclCommAbort(ncclComm* comm) {
  comm->state->aborted = true;
  delete comm;
  return kSuccess;
}

EXPORTED Result ncclAllGather(const void* mine, void* all, size_t count, int type, ncclComm* comm,
                              cudaStream_t stream) {
  if (const Result result = check(comm, count, type); result != kSuccess) return result;
  const size_t bytes = count * sizeof(float);
  Steps steps(comm, "ncclAllGather", stream);
  // A slot is filled again two operations later: then all are done with the one between, and have emptied this one.
  steps.add(mine, bytes, false, always,
            [=](State& state) { fill(state.room->gathered[state.rank][state.gathered % 2], mine, bytes); });
  steps.add(
      all, bytes * comm->state->size, true,
      [](const State& state) {
        for (int r = 0; r < state.size; ++r) {
          if (state.room->gathered[r][state.gathered % 2].filled.load() <= state.gathered / 2) return false;
        }
        return true;
      },
      [=](State& state) {
        for (int r = 0; r < state.size; ++r) {
          empty(state.room->gathered[r][state.gathered % 2], static_cast<char*>(all) + r * bytes, bytes);
        }
        ++state.gathered;
      });
  return connect(comm);
}

// It is over when the other has what was sent.
EXPORTED Result ncclSend(const void* data, size_t count, int type, int to, ncclComm* comm, cudaStream_t stream) {
  if (const Result result = check(comm, count, type); result != kSuccess) return result;
  const size_t bytes = count * sizeof(float);
  const auto all_taken = [=](const State& state) {
    return state.room->sent[state.rank][to].emptied.load() == state.sent[to];
  };
  Steps steps(comm, "ncclSend", stream);
  steps.add(data, bytes, false, all_taken, [=](State& state) {
    ++state.sent[to];
    fill(state.room->sent[state.rank][to], data, bytes);
  });
  steps.add(data, bytes, false, all_taken, [](State&) {});
  return connect(comm);
}

EXPORTED Result ncclRecv(void* data, size_t count, int type, int from, ncclComm* comm, cudaStream_t stream) {
  if (const Result result = check(comm, count, type); result != kSuccess) return result;
  const size_t bytes = count * sizeof(float);
  Steps steps(comm, "ncclRecv", stream);
  steps.add(
      data, bytes, true,
      [=](const State& state) { return state.room->sent[from][state.rank].filled.load() > state.received[from]; },
      [=](State& state) {
        ++state.received[from];
        empty(state.room->sent[from][state.rank], data, bytes);
      });
  return connect(comm);
}
