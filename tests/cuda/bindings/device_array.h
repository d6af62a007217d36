// NumPy arrays in device memory for the length of a call.
#pragma once

#include <pybind11/numpy.h>

#include <optional>
#include <vector>

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

class DeviceArray {
 public:
  explicit DeviceArray(const pybind11::array& host)
      : shape_(host.shape(), host.shape() + host.ndim()), dtype_(host.dtype()) {
    FS_CHECK((host.flags() & pybind11::array::c_style) != 0, "an array is not contiguous");
    memory_ = Memory(Place::kDevice, static_cast<size_t>(host.nbytes()));
    if (host.nbytes() > 0) check(cudaMemcpy(memory_.as<void>(), host.data(), memory_.bytes(), cudaMemcpyHostToDevice));
  }
  DeviceArray(DeviceArray&&) = default;

  template <class T>
  T* as() const {
    return memory_.as<T>();
  }
  // As it is now: after the stream that changes it was waited for.
  pybind11::array download() const {
    pybind11::array host(dtype_, shape_);
    if (host.nbytes() > 0) {
      check(cudaMemcpy(host.mutable_data(), memory_.as<void>(), memory_.bytes(), cudaMemcpyDeviceToHost));
    }
    return host;
  }

 private:
  Memory memory_;
  std::vector<pybind11::ssize_t> shape_;
  pybind11::dtype dtype_;
};

// Nothing for None.
class OptionalArray {
 public:
  explicit OptionalArray(const std::optional<pybind11::array>& host) {
    if (host) array_.emplace(*host);
  }
  template <class T>
  T* as() const {
    return array_ ? array_->as<T>() : nullptr;
  }

 private:
  std::optional<DeviceArray> array_;
};

}  // namespace fastserve::cuda
