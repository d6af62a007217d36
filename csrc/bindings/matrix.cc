// Weight matrices and products by themselves, for tests and measurements.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>

#include "backend/cpu/cpu_backend.h"
#include "bindings/arrays.h"
#include "bindings/register.h"
#include "common/buffer.h"
#include "model/dequantize.h"

namespace py = pybind11;

namespace fastserve {

namespace {

class PyMatrix {
 public:
  PyMatrix(int64_t n, int64_t k, const std::string& format, int threads)
      : backend_(make_cpu_backend(threads)), matrix_(backend_->make_matrix(n, k, parse_weight_format(format))) {}

  void load(const std::string& type, const Array<uint8_t>& data, int64_t first_row) {
    const SourceType source = parse_source_type(type);
    const int64_t row_bytes = source_bytes(source, matrix_->k), rows = data.size() / row_bytes;
    FS_CHECK(rows * row_bytes == data.size() && first_row >= 0 && first_row + rows <= matrix_->n, "load: ", data.size(),
             " bytes are no rows of ", row_bytes, " bytes from row ", first_row, " of ", matrix_->n);
    backend_->load_rows(*matrix_, first_row, rows, source, data.data());
  }

  py::array rows(const std::vector<int32_t>& ids) {
    for (const int32_t id : ids) FS_CHECK(id >= 0 && id < matrix_->n, "rows: no row ", id, " in ", matrix_->n);
    const auto count = static_cast<int64_t>(ids.size());
    std::vector<float> values(count * matrix_->k);
    backend_->begin({.rows = {}, .token_ids = ids, .positions = {}, .logit_tokens = {}});
    backend_->embed({.table = matrix_.get(),
                     .by = EmbeddedBy::kToken,
                     .first = 0,
                     .output = values.data(),
                     .ld = matrix_->k,
                     .accumulate = false});
    return to_array(std::move(values), {count, matrix_->k});
  }

  py::array multiply(const Array<float>& input, const std::optional<Array<float>>& bias,
                     const std::optional<Array<float>>& onto) {
    const int64_t n = matrix_->n;
    prepare(input);
    Buffer padded_bias(ld_output_ * sizeof(float));
    if (bias) {
      FS_CHECK(bias->size() == n, "multiply: the bias has ", bias->size(), " elements, not ", n);
      std::memcpy(padded_bias.as<float>(), bias->data(), n * sizeof(float));
    }
    if (onto) {
      FS_CHECK(onto->ndim() == 2 && onto->shape(0) == m_ && onto->shape(1) == n, "multiply: `onto` has another shape");
      for (int64_t row = 0; row < m_; ++row) {
        std::memcpy(output_.as<float>() + row * ld_output_, onto->data(row, 0), n * sizeof(float));
      }
    }
    run(bias ? padded_bias.as<float>() : nullptr, onto.has_value());
    std::vector<float> values(m_ * n);
    for (int64_t row = 0; row < m_; ++row) {
      std::memcpy(values.data() + row * n, output_.as<float>() + row * ld_output_, n * sizeof(float));
    }
    return to_array(std::move(values), {m_, n});
  }

  double seconds(const Array<float>& input, int repeats) {
    prepare(input);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) run(nullptr, false);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
  }

  int64_t bytes() const { return matrix_->bytes(); }

 private:
  // Rows as the transformer lays them out; what is beyond them is not zero there either.
  void prepare(const Array<float>& input) {
    FS_CHECK(input.ndim() == 2 && input.shape(1) == matrix_->k, "the input must be [m, ", matrix_->k, "]");
    m_ = input.shape(0);
    ld_input_ = round_up(matrix_->k, kPad);
    ld_output_ = round_up(matrix_->n, kPad);
    input_ = Buffer(m_ * ld_input_ * sizeof(float));
    output_ = Buffer(m_ * ld_output_ * sizeof(float));
    std::fill_n(input_.as<float>(), m_ * ld_input_, 1e30f);
    for (int64_t row = 0; row < m_; ++row) {
      std::memcpy(input_.as<float>() + row * ld_input_, input.data(row, 0), matrix_->k * sizeof(float));
    }
  }
  void run(const float* bias, bool accumulate) {
    backend_->gemm({.input = input_.as<float>(),
                    .ld_input = ld_input_,
                    .weight = matrix_.get(),
                    .bias = bias,
                    .output = output_.as<float>(),
                    .ld_output = ld_output_,
                    .m = m_,
                    .wide = true,
                    .accumulate = accumulate});
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Matrix> matrix_;
  Buffer input_, output_;
  int64_t m_ = 0, ld_input_ = 0, ld_output_ = 0;
};

}  // namespace

void register_matrix(py::module_& module) {
  py::class_<PyMatrix>(module, "Matrix", "For tests and measurements: a weight matrix [n, k] and products with it.")
      .def(py::init<int64_t, int64_t, const std::string&, int>(), py::arg("n"), py::arg("k"), py::arg("format"),
           py::arg("threads") = 1)
      .def("load", &PyMatrix::load, py::arg("dtype"), py::arg("data").noconvert(), py::arg("first_row") = 0)
      .def("rows", &PyMatrix::rows, py::arg("ids"), "Rows as float32.")
      .def("multiply", &PyMatrix::multiply, py::arg("input"), py::arg("bias") = py::none(),
           py::arg("onto") = py::none(), "input · matrixᵀ (+ bias) (+ onto)")
      .def("seconds", &PyMatrix::seconds, py::arg("input"), py::arg("repeats"), "Of one product, on average.")
      .def_property_readonly("bytes", &PyMatrix::bytes);
}

}  // namespace fastserve
