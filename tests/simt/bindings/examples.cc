#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

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
  using Place = std::tuple<int, int, int, uint32_t, uint32_t>;  // offset, step, swizzle's bytes, leading, stride
  module.def(
      "example_product",
      [](const std::string& how, const std::string& dtype, const py::array_t<uint8_t>& image, const Place& a,
         const Place& b, int steps, const py::array_t<float>& onto) {
        const Stream stream;
        const DeviceArray shared(image), sums(onto);
        const auto operand = [](const Place& place) {
          const auto [offset, step, bytes, leading, stride] = place;
          const Swizzle swizzle = bytes == 128  ? Swizzle::k128
                                  : bytes == 64 ? Swizzle::k64
                                  : bytes == 32 ? Swizzle::k32
                                                : Swizzle::kNone;
          return OperandPlace{offset, step, swizzle, leading, stride};
        };
        example_product(how, parse_dtype(dtype), static_cast<int>(onto.shape(1)), shared.as<unsigned char>(),
                        static_cast<int>(image.size()), operand(a), operand(b), steps, sums.as<float>(), stream);
        stream.synchronize();
        return sums.numpy();
      },
      "how"_a, "dtype"_a, "image"_a, "a"_a, "b"_a, "steps"_a, "onto"_a);
  module.def(
      "example_copies",
      [](const std::string& how, const py::array_t<uint16_t>& matrix, py::ssize_t tiles) {
        const Stream stream;
        const DeviceArray from(matrix), out = DeviceArray::zeros(matrix.dtype(), {tiles, 2, 16, 64});
        example_copies(how, from.as<uint16_t>(), static_cast<int>(matrix.shape(0)), static_cast<int>(tiles),
                       out.as<uint16_t>(), stream);
        stream.synchronize();
        return out.numpy();
      },
      "how"_a, "matrix"_a, "tiles"_a);
}

}  // namespace fastserve::cuda
