// NumPy arrays in and out.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <utility>
#include <vector>

#include "common/check.h"

namespace fastserve {

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// A one- or two-dimensional array attribute of the exact element type; `columns` 0 asks for one dimension.
template <class T>
Array<T> array_attribute(const pybind11::handle& object, const char* name, int64_t columns = 0) {
  const pybind11::object value = object.attr(name);
  FS_CHECK(pybind11::isinstance<Array<T>>(value), "plan.", name, " has the wrong element type or is not contiguous");
  auto array = pybind11::reinterpret_borrow<Array<T>>(value);
  FS_CHECK(columns == 0 ? array.ndim() == 1 : array.ndim() == 2 && array.shape(1) == columns, "plan.", name,
           " has the wrong shape");
  return array;
}

// Hands the vector's memory to NumPy without a copy.
template <class T>
pybind11::array to_array(std::vector<T> values, std::vector<pybind11::ssize_t> shape) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  pybind11::capsule capsule(owner.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return pybind11::array_t<T>(std::move(shape), data, capsule);
}

}  // namespace fastserve
