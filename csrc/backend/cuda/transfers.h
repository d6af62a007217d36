// What the host puts together for every iteration, on its way to the device and back.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <span>
#include <utility>

#include "backend/cuda/kernels.h"
#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

// As many bytes a kernel copies, past whatever the copy engines are at; more are worth one of them.
constexpr size_t kMostByKernel = size_t{1} << 20;

// Queues a copy of whole words between pinned memory and the device's.
inline void queue_copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes <= kMostByKernel) return copy_words(from, to, static_cast<int64_t>(bytes), stream);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
}

// More than batches are queued at a time.
constexpr size_t kTransfers = 3;

// Pinned memory for the transfer of one iteration, which is used again when its copy is known to be done.
struct Transfer {
  Memory pinned;
  Event copied;
  bool used = false;

  void* reserve(size_t bytes) {
    if (used) copied.synchronize();
    used = false;
    if (pinned.bytes() < bytes) pinned = Memory(Place::kPinned, std::bit_ceil(bytes));
    return pinned.as<void>();
  }
  void mark(cudaStream_t stream) {
    copied.record(stream);
    used = true;
  }
};

// Uploads to one address, as long as what is uploaded fits there.
class Uploads {
 public:
  // Makes room, there and in the pinned memory on the way, after what is queued on the stream; the address.
  std::byte* reserve(size_t bytes, cudaStream_t stream) {
    if (device_.bytes() < bytes) {
      check(cudaStreamSynchronize(stream));  // what is queued works on the one before
      device_ = Memory(Place::kDevice, std::bit_ceil(2 * bytes));
      for (Transfer& transfer : transfers_) transfer.reserve(device_.bytes());
      moved_ = true;
    }
    return device_.as<std::byte>();
  }
  // Queues the upload, of whole words, to the address that reserve() gave for as many bytes.
  void upload(std::span<const std::byte> data, cudaStream_t stream) {
    Transfer& transfer = transfers_[next_];
    next_ = (next_ + 1) % kTransfers;
    void* pinned = transfer.reserve(data.size());
    std::memcpy(pinned, data.data(), data.size());
    queue_copy(device_.as<void>(), pinned, data.size(), stream);
    transfer.mark(stream);
  }
  // Whether the address has changed since this was last asked.
  bool moved() { return std::exchange(moved_, false); }

 private:
  Memory device_;
  std::array<Transfer, kTransfers> transfers_;
  size_t next_ = 0;
  bool moved_ = false;
};

}  // namespace fastserve::cuda
