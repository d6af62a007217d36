// Ranks that exchange by NVIDIA's library NCCL, between devices: what one device has of it.
//
// The library is looked for when it is asked for: nothing is linked with it, and its headers are not needed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "backend/cuda/runtime_api.h"
#include "backend/device_communicator.h"
#include "comm/communicator.h"

namespace fastserve::cuda {

class NcclCommunicator;

class Nccl {
 public:
  // Operations are queued on `stream`, on one thread. `forget`: drops recorded operations.
  Nccl(int device, cudaStream_t stream, std::function<void()> forget)
      : device_(device), stream_(stream), forget_(std::move(forget)) {}
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  // See Backend::connect().
  std::unique_ptr<DeviceCommunicator> connect(Communicator& ranks, int first, int count, int64_t most);

  // Whether what is queued may wait for other ranks: then the driver must not be waited for, which knows nothing of
  // their end.
  bool used() const { return !open_.empty(); }
  // Until it is so. Throws a GroupError when that cannot be; nothing waits for other ranks then any more.
  void wait_until(const std::function<bool()>& ready);

 private:
  friend class NcclCommunicator;

  void look(double seconds);
  void abort() noexcept;
  // Lets the device come near enough for the driver's queue of launches, which blocks when it is full, never to be.
  void pace();

  const int device_;
  const cudaStream_t stream_;
  const std::function<void()> forget_;
  std::vector<NcclCommunicator*> open_;
  int64_t operations_ = 0;
  Event marks_[2];
};

}  // namespace fastserve::cuda
