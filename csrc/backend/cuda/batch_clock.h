// When batches ran on the device, by its own clock; for benchmarks. Does nothing until it is asked to.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "backend/device_probe.h"

namespace fastserve::cuda {

class BatchClock {
 public:
  // Of this process: whoever measures has no hold of the backend that a runtime owns.
  static BatchClock& instance();

  // Between a batch's upload and its first kernel, and after its last one. From one thread.
  void begin(cudaStream_t stream) {
    if (running_.load(std::memory_order_acquire)) record_begin(stream);
  }
  void end(cudaStream_t stream) {
    if (running_.load(std::memory_order_acquire)) record_end(stream);
  }

  // See DeviceProbe. While no batch is under way.
  void start(int64_t most);
  std::vector<BatchSpan> take();

 private:
  struct Events {
    cudaEvent_t begin = nullptr, end = nullptr;
  };

  BatchClock() = default;

  void record_begin(cudaStream_t stream);
  void record_end(cudaStream_t stream);

  std::atomic<bool> running_{false};
  std::vector<Events> events_;
  size_t begun_ = 0, ended_ = 0;
};

}  // namespace fastserve::cuda
