#include <pybind11/pybind11.h>

#include "bindings/device_array.h"
#include "examples/examples.h"
#include "register_all.h"

namespace fastserve::cuda {

void register_examples(pybind11::module_& module) {
  using namespace pybind11::literals;
  module.def(
      "example_add",
      [](const std::string& dtype, const pybind11::array& a, const pybind11::array& b) {
        const Stream stream;
        const DeviceArray left(a), right(b), sum = DeviceArray::zeros(a.dtype(), {a.shape(0)});
        example_add(parse_dtype(dtype), left.data(), right.data(), sum.data(), a.shape(0), stream);
        stream.synchronize();
        return sum.numpy();
      },
      "dtype"_a, "a"_a, "b"_a);
}

}  // namespace fastserve::cuda
