// cuBLASLt's products, or a stand-in's, on NumPy arrays of 16-bit elements, which come as uint16.
#include "backend/cuda/cublaslt.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "backend/cuda/gemm_kernels.h"
#include "device_array.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

// Products of one shape.
class CublasProducts {
 public:
  CublasProducts(const std::string& dtype, int64_t n, int64_t k_padded, bool wide, bool finished, int64_t most_rows)
      : workspace_(Place::kDevice, kGemmWorkspace), library_(CublasLt::open()) {
    FS_CHECK(library_ != nullptr, "there is no cuBLASLt");
    const ProductKey key{parse_dtype(dtype), n, k_padded, wide, finished};
    chosen_ = library_->choose(key, most_rows, workspace_.as<void>(), stream_);
    FS_CHECK(chosen_ == library_->choose(key, most_rows, workspace_.as<void>(), stream_),
             "another choice for the same shape");
  }

  std::optional<std::string> text() const { return chosen_ == nullptr ? std::nullopt : std::optional(chosen_->text()); }

  // input [m, k_padded] times weight [n, k_padded], onto an output [m, ld]; null: the product is not for cuBLASLt.
  std::optional<py::array> multiply(const py::array& input, const py::array& weight, const py::object& bias,
                                    const py::array& output, bool accumulate, bool gated) const {
    const DeviceArray device_input(input), device_weight(weight), device_output(output);
    const DeviceArray device_bias = DeviceArray::optional(bias);
    const GemmCall call{.dtype = chosen_->key.dtype,
                        .input = device_input.data(),
                        .ld_input = input.shape(1),
                        .weight = {format_of(chosen_->key.dtype), weight.shape(0), weight.shape(1), weight.shape(1),
                                   device_weight.data(), nullptr, gated},
                        .bias = device_bias.as<float>(),
                        .output = device_output.data(),
                        .ld_output = output.shape(1),
                        .m = input.shape(0),
                        .wide = chosen_->key.wide,
                        .accumulate = accumulate,
                        .gated = gated,
                        .workspace = workspace_.as<void>()};
    if (!library_->gemm(*chosen_, call, stream_)) return std::nullopt;
    stream_.synchronize();
    return device_output.numpy();
  }

 private:
  Stream stream_;
  Memory workspace_;
  std::unique_ptr<CublasLt> library_;
  const CublasShape* chosen_ = nullptr;
};

// Makes columns [first, first + columns) of an n columns wide product, or what they make in pairs, of float32 sums [m,
// ld_sums], in an output [m, ld].
py::array finish(const std::string& dtype, const py::array& sums, int64_t first, int64_t columns, int64_t n,
                 const py::object& bias, const py::array& output, bool accumulate, bool gated) {
  const DeviceArray device_sums(sums), device_output(output), device_bias = DeviceArray::optional(bias);
  const DType type = parse_dtype(dtype);
  const GemmCall call{.dtype = type,
                      .input = nullptr,
                      .ld_input = 0,
                      .weight = {format_of(type), n, 0, 0, nullptr, nullptr},
                      .bias = device_bias.as<float>(),
                      .output = device_output.data(),
                      .ld_output = output.shape(1),
                      .m = output.shape(0),
                      .wide = output.itemsize() == 4,
                      .accumulate = accumulate,
                      .gated = gated};
  const Stream stream;
  finish_product(call, device_sums.as<float>(), sums.shape(1), first, columns, stream);
  stream.synchronize();
  return device_output.numpy();
}

}  // namespace

void register_cublaslt(py::module_& module) {
  module.def("has_cublaslt", [] { return CublasLtLibrary::open() != nullptr; });
  module.def("finish_product", &finish, py::arg("dtype"), py::arg("sums"), py::arg("first"), py::arg("columns"),
             py::arg("n"), py::arg("bias"), py::arg("output"), py::arg("accumulate"), py::arg("gated") = false);
  py::class_<CublasProducts>(module, "CublasProducts")
      .def(py::init<const std::string&, int64_t, int64_t, bool, bool, int64_t>(), py::arg("dtype"), py::arg("n"),
           py::arg("k"), py::arg("wide"), py::arg("finished") = false, py::arg("most_rows") = 1)
      .def_property_readonly("text", &CublasProducts::text)
      .def("multiply", &CublasProducts::multiply, py::arg("input"), py::arg("weight"), py::arg("bias"),
           py::arg("output"), py::arg("accumulate"), py::arg("gated") = false);
}

}  // namespace fastserve::cuda
