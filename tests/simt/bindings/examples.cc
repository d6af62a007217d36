#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/device_array.h"
#include "examples/examples.h"
#include "register_all.h"

namespace fastserve::cuda {

namespace py = pybind11;

void register_examples(py::module_& module) {
  using namespace pybind11::literals;
  module.def(
      "example_add",
      [](const std::string& dtype, const py::array& a, const py::array& b) {
        const Stream stream;
        const DeviceArray left(a), right(b), sum = DeviceArray::zeros(a.dtype(), {a.shape(0)});
        example_add(parse_dtype(dtype), left.data(), right.data(), sum.data(), a.shape(0), stream);
        stream.synchronize();
        return sum.numpy();
      },
      "dtype"_a, "a"_a, "b"_a);
  module.def(
      "example_collective",
      [](const std::string& name, const py::array_t<int32_t>& values) {
        const Stream stream;
        const DeviceArray in(values), out = DeviceArray::zeros(values.dtype(), {32});
        example_collective(name, in.as<int32_t>(), out.as<int32_t>(), stream);
        stream.synchronize();
        return out.numpy();
      },
      "name"_a, "values"_a);
  module.def(
      "example_multiply",
      [](const std::string& dtype, const py::array_t<uint16_t>& a, const py::array_t<uint16_t>& b,
         const py::array_t<float>& d, bool swapped) {
        const Stream stream;
        const DeviceArray left(a), right(b), sums(d);
        example_multiply(parse_dtype(dtype), left.as<uint16_t>(), right.as<uint16_t>(), sums.as<float>(), swapped,
                         stream);
        stream.synchronize();
        return sums.numpy();
      },
      "dtype"_a, "a"_a, "b"_a, "d"_a, "swapped"_a = false);
  module.def(
      "example_load_matrices",
      [](const py::array_t<uint16_t>& rows, bool transposed) {
        const Stream stream;
        const DeviceArray in(rows), out = DeviceArray::zeros(rows.dtype(), {32, 4, 2});
        example_load_matrices(in.as<uint16_t>(), out.as<uint16_t>(), transposed, stream);
        stream.synchronize();
        return out.numpy();
      },
      "rows"_a, "transposed"_a);
  module.def(
      "example_planted",
      [](const std::string& name, const py::array_t<float>& values) {
        const Stream stream;
        const DeviceArray data(values);
        example_planted(name, data.as<float>(), stream);
        stream.synchronize();
        return data.numpy();
      },
      "name"_a, "values"_a);
  module.def("planted_names", planted_names);
}

}  // namespace fastserve::cuda
