// Ranks that exchange by NVIDIA's library NCCL, between devices: what one device has of it.
//
// The library is looked for when it is asked for: nothing is linked with it, and its headers are not needed.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "backend/cuda/event_watch.h"
#include "backend/cuda/runtime_api.h"
#include "backend/device_communicator.h"
#include "comm/communicator.h"

namespace fastserve::cuda {

class NcclCommunicator;

class Nccl {
 public:
  // Operations are queued on `stream`, on one thread, which lends its `watch`. `forget`: drops recorded operations.
  Nccl(int device, cudaStream_t stream, EventWatch& watch, std::function<void()> forget)
      : device_(device), stream_(stream), watch_(watch), forget_(std::move(forget)) {}
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  // See Backend::connect().
  std::unique_ptr<DeviceCommunicator> connect(Communicator& ranks, int first, int count, int64_t most);

  // Whether what is queued may wait for other ranks: then the driver must not be waited for, which knows nothing of
  // their end.
  bool used() const { return !open_.empty(); }
  // Until the event has passed. Throws a GroupError when it cannot; nothing waits for other ranks then any more.
  void wait_for(const Event& event);

 private:
  friend class NcclCommunicator;
  using Park = std::function<void(std::chrono::nanoseconds most)>;

  // Until it is so, with looks at the ranks and `park` between them; throws as wait_for() does.
  void wait_until(const std::function<bool()>& ready, const Park& park);
  void look(double seconds);
  void abort() noexcept;
  // Lets the device come near enough for the driver's queue of launches, which blocks when it is full, never to be.
  void pace();

  const int device_;
  const cudaStream_t stream_;
  EventWatch& watch_;
  const std::function<void()> forget_;
  std::vector<NcclCommunicator*> open_;
  int64_t operations_ = 0;
  Event marks_[2];
};

}  // namespace fastserve::cuda
