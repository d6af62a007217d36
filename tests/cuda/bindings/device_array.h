// NumPy arrays in device memory.
#pragma once

#include <pybind11/numpy.h>

#include <string>
#include <vector>

#include "backend/cuda/runtime_api.h"
#include "common/dtype.h"

namespace fastserve::cuda {

// A copy of an array, and back. Elements of bfloat16 and float16 are uint16 in NumPy, by their bits.
class DeviceArray {
 public:
  explicit DeviceArray(const pybind11::array& values)
      : type_(values.dtype()), shape_(values.shape(), values.shape() + values.ndim()) {
    const auto dense = pybind11::array::ensure(values, pybind11::array::c_style);
    memory_ = Memory(Place::kDevice, static_cast<size_t>(dense.nbytes()));
    if (dense.nbytes() == 0) return;
    check(cudaMemcpy(data(), dense.data(), static_cast<size_t>(dense.nbytes()), cudaMemcpyHostToDevice));
    check(cudaStreamSynchronize(nullptr));  // for which other streams do not wait
  }
  // None is a null pointer.
  static DeviceArray optional(const pybind11::object& values) {
    return values.is_none() ? DeviceArray() : DeviceArray(pybind11::cast<pybind11::array>(values));
  }
  static DeviceArray zeros(const pybind11::dtype& type, std::vector<pybind11::ssize_t> shape) {
    DeviceArray made;
    made.type_ = type;
    made.shape_ = std::move(shape);
    size_t bytes = static_cast<size_t>(type.itemsize());
    for (const pybind11::ssize_t length : made.shape_) bytes *= static_cast<size_t>(length);
    made.memory_ = Memory(Place::kDevice, bytes);
    return made;
  }

  void* data() const { return memory_.as<void>(); }
  template <class T>
  T* as() const {
    return memory_.as<T>();
  }
  pybind11::ssize_t shape(size_t axis) const { return shape_.at(axis); }

  // What is queued on other streams than the default one must be waited for before.
  pybind11::array numpy() const {
    pybind11::array values(type_, shape_);
    if (memory_.bytes() > 0) check(cudaMemcpy(values.mutable_data(), data(), memory_.bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  DeviceArray() : type_(pybind11::dtype::of<float>()) {}

  pybind11::dtype type_;
  std::vector<pybind11::ssize_t> shape_;
  Memory memory_;
};

inline pybind11::dtype numpy_type(DType dtype) {
  return dtype == DType::kFloat32 ? pybind11::dtype::of<float>() : pybind11::dtype::of<uint16_t>();
}

}  // namespace fastserve::cuda
