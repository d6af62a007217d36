// Matrices on the device and their products, for tests/cuda/test_gemm_kernels.py.
#include "backend/cuda/gemm_kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "backend/cuda/matrix.h"
#include "model/dequantize.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

constexpr unsigned char kUntouched = 0xa5;  // what outputs hold before a product

// float32 as the given type, and back.
void store(DType dtype, float value, char* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &value, 4);
  } else {
    const uint16_t bits = dtype == DType::kBFloat16 ? to_bf16(value).bits : to_half(value).bits;
    std::memcpy(to, &bits, 2);
  }
}
float load(DType dtype, const char* from) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, size_of(dtype));
  if (dtype == DType::kFloat32) return __builtin_bit_cast(float, bits);
  const auto half = static_cast<uint16_t>(bits);
  return dtype == DType::kBFloat16 ? to_float(Bf16{half}) : half_to_float(half);
}

struct DeviceArray {
  explicit DeviceArray(const std::vector<char>& host) : memory(Place::kDevice, host.size()) {
    check(cudaMemcpy(memory.as<void>(), host.data(), host.size(), cudaMemcpyHostToDevice));
    check(cudaStreamSynchronize(nullptr));  // for which other streams do not wait
  }
  std::vector<char> download() const {
    std::vector<char> host(memory.bytes());
    check(cudaMemcpy(host.data(), memory.as<void>(), host.size(), cudaMemcpyDeviceToHost));
    return host;
  }
  Memory memory;
};

GemmKernel kernel_named(const std::string& name) {
  for (int i = 0; i < kGemmKernels; ++i) {
    if (name == kGemmGeometries[i].name) return static_cast<GemmKernel>(i);
  }
  throw py::value_error("no kernel is named " + name);
}

class Products {
 public:
  Products(int64_t n, int64_t k, const std::string& format, bool paired)
      : matrix_(n, k, parse_weight_format(format), staging_,
                paired ? CudaMatrix::Rows::kPaired : CudaMatrix::Rows::kPlain) {}

  int64_t rows() const { return matrix_.n; }
  int64_t bytes() const { return matrix_.bytes(); }

  void load_rows(const std::string& type, const py::array_t<uint8_t, py::array::c_style>& data, int64_t first_row) {
    const SourceType source = parse_source_type(type);
    matrix_.load_rows(first_row, data.size() / source_bytes(source, matrix_.k), source, data.data());
  }

  // x [m, k] · weightᵀ, as float32, whatever type it had on the device; `gated`: what its columns make in pairs.
  Floats multiply(const Floats& x, const std::string& dtype, const std::optional<Floats>& bias,
                  const std::optional<Floats>& onto, bool wide, const std::optional<std::string>& kernel,
                  bool workspace, int processors, int64_t bias_at, bool gated) {
    const DType type = parse_dtype(dtype), output_type = wide ? DType::kFloat32 : type;
    const int64_t m = x.shape(0), columns = matrix_.view().n, n = gated ? columns / 2 : columns, k = matrix_.k;
    // Wider than need be, and with rows behind: both must stay as they are.
    const int64_t ld_input = round_up(k, kPad) + kPad, ld_output = round_up(n, kPad) + kPad;
    const int64_t size = size_of(type), output_size = size_of(output_type);
    std::vector<char> input(m * ld_input * size), output((m + 1) * ld_output * output_size, kUntouched);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < k; ++j) store(type, x.at(i, j), &input[(i * ld_input + j) * size]);
      for (int64_t j = 0; onto && j < n; ++j) {
        store(output_type, onto->at(i, j), &output[(i * ld_output + j) * output_size]);
      }
    }
    const DeviceArray from(input), to(output);
    std::vector<char> bias_bytes(round_up(columns, kPad) * 4);
    if (bias) std::memcpy(bias_bytes.data(), bias->data(), columns * 4);
    const DeviceArray device_bias(bias_bytes);
    if (workspace && workspace_.bytes() == 0) workspace_ = Memory(Place::kDevice, kGemmWorkspace);
    const GemmCall call{.dtype = type,
                        .input = from.memory.as<void>(),
                        .ld_input = ld_input,
                        .weight = matrix_.view(),
                        .bias = bias ? device_bias.memory.as<float>() + bias_at : nullptr,
                        .output = to.memory.as<void>(),
                        .ld_output = ld_output,
                        .m = m,
                        .wide = wide,
                        .accumulate = onto.has_value(),
                        .gated = gated,
                        .workspace = workspace ? workspace_.as<void>() : nullptr};
    if (kernel) {
      gemm_with(kernel_named(*kernel), call, stream_, processors);
    } else {
      gemm(call, stream_);
    }
    stream_.synchronize();
    output = to.download();
    Floats result({m, n});
    for (int64_t i = 0; i <= m; ++i) {
      for (int64_t j = 0; j < ld_output; ++j) {
        const char* at = &output[(i * ld_output + j) * output_size];
        if (i < m && j < n) {
          result.mutable_at(i, j) = load(output_type, at);
        } else if (static_cast<unsigned char>(*at) != kUntouched) {
          throw std::runtime_error("a product wrote beside its output");
        }
      }
    }
    return result;
  }

 private:
  Staging staging_;
  CudaMatrix matrix_;
  Memory workspace_;
  Stream stream_;
};

std::string chosen(int64_t m, int64_t n, int64_t k, const std::string& format, int processors, int64_t shared_bytes,
                   bool workspace, bool warpgroups) {
  const GemmShape shape{m, n, round_up(k, kPad), parse_weight_format(format)};
  return geometry(choose_gemm(shape, {processors, shared_bytes, warpgroups}, workspace ? kGemmWorkspace : 0)).name;
}

}  // namespace

void register_gemm(py::module_& module) {
  py::class_<Products>(module, "Matrix")
      .def(py::init<int64_t, int64_t, const std::string&, bool>(), py::arg("n"), py::arg("k"), py::arg("format"),
           py::kw_only(), py::arg("paired") = false)
      .def_property_readonly("rows", &Products::rows)
      .def_property_readonly("bytes", &Products::bytes)
      .def("load_rows", &Products::load_rows, py::arg("type"), py::arg("data"), py::arg("first_row") = 0)
      .def("multiply", &Products::multiply, py::arg("x"), py::arg("dtype"), py::kw_only(), py::arg("bias") = py::none(),
           py::arg("onto") = py::none(), py::arg("wide") = true, py::arg("kernel") = py::none(),
           py::arg("workspace") = true, py::arg("processors") = 0, py::arg("bias_at") = 0, py::arg("gated") = false);
  std::vector<std::string> names;
  for (const GemmGeometry& g : kGemmGeometries) names.emplace_back(g.name);
  module.attr("GEMM_KERNELS") = py::cast(names);
  module.attr("WARPGROUP_KERNELS") = py::cast([] {
    std::vector<std::string> warpgroups;
    for (const GemmGeometry& g : kGemmGeometries) {
      if (g.way == GemmGeometry::Way::kWarpgroup) warpgroups.emplace_back(g.name);
    }
    return warpgroups;
  }());
  module.attr("GEMM_SPLIT_KERNELS") = py::cast([] {
    std::vector<std::string> split;
    for (const GemmGeometry& g : kGemmGeometries) {
      if (g.split) split.emplace_back(g.name);
    }
    return split;
  }());
  module.def("choose_gemm", &chosen, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("format"), py::kw_only(),
             py::arg("processors") = 132, py::arg("shared_bytes") = 227 * 1024, py::arg("workspace") = true,
             py::arg("warpgroups") = false);
  module.def("gemm_shared_bytes", [](const std::string& kernel, const std::string& format) {
    return gemm_shared_bytes(kernel_named(kernel), parse_weight_format(format));
  });
}

}  // namespace fastserve::cuda
