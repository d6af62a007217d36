// What is tried of other libraries' products, for tests/cuda/test_product_trial.py.
#include "backend/cuda/product_trial.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/runtime_api.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

// Our own products under other names: "same"; "cannot" do 512 rows; "differs", always, by a bias; "depends", which does
// from 100 rows on; "adds" differently; "many", where there are more than 2048 rows.
Product stand_in(const std::string& kind, const float* bias) {
  return [kind, bias](const GemmCall& call, cudaStream_t stream) {
    if (kind == "cannot" && call.m == 512) return false;
    GemmCall changed = call;
    if (kind == "differs" || (kind == "depends" && call.m >= 100) || (kind == "adds" && call.accumulate) ||
        (kind == "many" && call.m > 2048)) {
      changed.bias = bias;
    }
    gemm(changed, stream);
    return true;
  };
}

ProductTrial measure(const std::string& dtype, int64_t n, int64_t k, bool wide, const std::string& kind,
                     int64_t most_rows) {
  Stream stream;
  const Memory workspace(Place::kDevice, kGemmWorkspace);
  // Five runs take 0, 3, 1, 4 and 2 seconds.
  int runs = 0;
  const DeviceClock clock = [&runs](cudaStream_t, const std::function<void()>& body) {
    body();
    return static_cast<double>(runs++ * 3 % 5);
  };
  ProductTrials trials(parse_dtype(dtype), n, k, wide, most_rows, workspace.as<void>(), stream, clock);
  const std::vector<float> ones(n, 1.0f);
  const Memory bias(Place::kDevice, n * sizeof(float));
  check(cudaMemcpy(bias.as<void>(), ones.data(), bias.bytes(), cudaMemcpyHostToDevice));
  check(cudaStreamSynchronize(nullptr));  // for which other streams do not wait
  ProductTrial trial = trials.measure(kind, stand_in(kind, bias.as<float>()));
  stream.synchronize();
  return trial;
}

// The rows of products that are timed, in order, and where in the weights' copies each one's begin.
std::vector<std::pair<int64_t, int64_t>> timed_products(const std::string& dtype, int64_t n, int64_t k) {
  Stream stream;
  const Memory workspace(Place::kDevice, kGemmWorkspace);
  bool timing = false;
  const DeviceClock clock = [&](cudaStream_t, const std::function<void()>& body) {
    timing = true;
    body();
    timing = false;
    return 1.0;
  };
  ProductTrials trials(parse_dtype(dtype), n, k, false, 1, workspace.as<void>(), stream, clock);
  std::vector<std::pair<int64_t, int64_t>> products;
  const auto log = [&](const GemmCall& call, cudaStream_t queue) {
    if (timing) products.emplace_back(call.m, reinterpret_cast<intptr_t>(call.weight.data));
    gemm(call, queue);
    return true;
  };
  trials.measure("logged", log);
  stream.synchronize();
  return products;
}

int64_t cache_bytes() {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
  return bytes;
}

}  // namespace

void register_product_trial(py::module_& module) {
  py::class_<ProductTrial>(module, "ProductTrial")
      .def(py::init([](std::string name, bool runs, bool same_as_ours, RowSeconds seconds) {
             return ProductTrial{std::move(name), runs, same_as_ours, seconds};
           }),
           py::arg("name"), py::arg("runs"), py::arg("same_as_ours"), py::arg("seconds"))
      .def_readonly("runs", &ProductTrial::runs)
      .def_readonly("same_as_ours", &ProductTrial::same_as_ours)
      .def_readonly("seconds", &ProductTrial::seconds);
  module.attr("TIMED_ROWS") = py::cast(kTimedRows);
  module.def("choose_product", [](const std::vector<ProductTrial>& trials, const RowSeconds& ours) {
    const ProductChoice choice = choose_product(trials, ours);
    return std::make_tuple(choice.trial, choice.from_rows, choice.verdicts);
  });
  module.def("measure_product", &measure, py::arg("dtype"), py::arg("n"), py::arg("k"), py::arg("wide"),
             py::arg("kind"), py::arg("most_rows") = 1);
  module.def("timed_products", &timed_products, py::arg("dtype"), py::arg("n"), py::arg("k"));
  module.def("cache_bytes", &cache_bytes);
  // finish_product() of sums [m, n] onto an output of float32, in windows of so many columns.
  using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
  module.def(
      "finish_product",
      [](const Floats& sums, const Floats& bias, const Floats& onto, int64_t window) {
        const int64_t m = sums.shape(0), n = sums.shape(1), ld = round_up(n, kPad);
        const auto rows = [&](const Floats& from, int64_t first, int64_t columns, int64_t stride) {
          Memory memory(Place::kDevice, m * stride * sizeof(float));
          for (int64_t i = 0; i < m; ++i) {
            check(cudaMemcpy(memory.as<float>() + i * stride, from.data(i, first), columns * sizeof(float),
                             cudaMemcpyHostToDevice));
          }
          check(cudaStreamSynchronize(nullptr));  // for which other streams do not wait
          return memory;
        };
        Stream stream;
        const Memory output = rows(onto, 0, n, ld);
        Memory device_bias(Place::kDevice, ld * sizeof(float));
        check(cudaMemcpy(device_bias.as<void>(), bias.data(), n * sizeof(float), cudaMemcpyHostToDevice));
        check(cudaStreamSynchronize(nullptr));
        const GemmCall call{.dtype = DType::kBFloat16,
                            .input = nullptr,
                            .ld_input = 0,
                            .weight = {WeightFormat::kBFloat16, n, kPad, kPad, nullptr, nullptr},
                            .bias = device_bias.as<float>(),
                            .output = output.as<void>(),
                            .ld_output = ld,
                            .m = m,
                            .wide = true,
                            .accumulate = true};
        for (int64_t first = 0; first < n; first += window) {
          const int64_t columns = std::min(window, n - first), stride = round_up(columns, kPad);
          const Memory part = rows(sums, first, columns, stride);
          finish_product(call, part.as<float>(), stride, first, columns, stream);
          stream.synchronize();
        }
        Floats result({m, n});
        for (int64_t i = 0; i < m; ++i) {
          check(cudaMemcpy(result.mutable_data(i, 0), output.as<float>() + i * ld, n * sizeof(float),
                           cudaMemcpyDeviceToHost));
        }
        return result;
      },
      py::arg("sums"), py::arg("bias"), py::arg("onto"), py::arg("window"));
}

}  // namespace fastserve::cuda
