// The CUDA runtime's handles with owners, and its errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "common/check.h"

namespace fastserve::cuda {

inline void check(cudaError_t status) {
  FS_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

// Memory of the device, or of the host and pinned; zero-filled.
enum class Place { kDevice, kPinned };

class Memory {
 public:
  Memory() = default;
  Memory(Place place, size_t bytes) : place_(place), bytes_(bytes) {
    if (bytes == 0) return;
    if (place == Place::kDevice) {
      check(cudaMalloc(&data_, bytes));
      check(cudaMemset(data_, 0, bytes));
      check(cudaStreamSynchronize(nullptr));  // our streams do not wait for that one
    } else {
      check(cudaHostAlloc(&data_, bytes, cudaHostAllocDefault));
      __builtin_memset(data_, 0, bytes);
    }
  }
  ~Memory() { free(); }
  Memory(Memory&& other) noexcept
      : place_(other.place_), data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(place_, other.place_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  Place place() const { return place_; }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // Gives the memory away: to cudaFree or cudaFreeHost, by its place.
  void* release() { return std::exchange(data_, nullptr); }

 private:
  void free() {  // errors of a device that is gone have been reported where they came up
    if (data_ == nullptr) return;
    static_cast<void>(place_ == Place::kDevice ? cudaFree(data_) : cudaFreeHost(data_));
  }

  Place place_ = Place::kDevice;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  operator cudaStream_t() const { return stream_; }
  void synchronize() const { check(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  // A thread that waits for it sleeps.
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventBlockingSync)); }
  ~Event() { static_cast<void>(cudaEventDestroy(event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  operator cudaEvent_t() const { return event_; }
  void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream)); }
  void synchronize() const { check(cudaEventSynchronize(event_)); }
  bool passed() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status != cudaErrorNotReady) check(status);
    return status == cudaSuccess;
  }
  // Or never will: synchronize() says why.
  bool settled() const { return cudaEventQuery(event_) != cudaErrorNotReady; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace fastserve::cuda
