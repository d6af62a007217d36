// The elementwise kernels on NumPy arrays. Elements of 16 bits come as uint16; what a kernel changes is returned.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "backend/cuda/kernels.h"
#include "backend/cuda/matrix.h"
#include "device_array.h"
#include "model/dequantize.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  FS_CHECK(name == "relu", "no such activation: ", name);
  return Activation::kRelu;
}

// The table is made of rows [n, k] of the source type, held in the format.
py::array embed_rows(const std::string& format, const std::string& type, const py::array& data, int64_t n, int64_t k,
                     const py::array& ids, const py::object& last_sampled, int32_t first, const py::array& output,
                     bool accumulate) {
  Staging staging;
  CudaMatrix table(n, k, parse_weight_format(format), staging);
  table.load_rows(0, n, parse_source_type(type), data.data());
  const DeviceArray device_ids(ids), device_output(output), sampled = DeviceArray::optional(last_sampled);
  const Stream stream;
  embed({.table = table.view(),
         .ids = device_ids.as<int32_t>(),
         .last_sampled = sampled.as<int32_t>(),
         .first = first,
         .count = static_cast<int32_t>(n),
         .tokens = ids.size(),
         .output = device_output.as<float>(),
         .ld = output.shape(1),
         .accumulate = accumulate},
        stream);
  stream.synchronize();
  return device_output.numpy();
}

py::array norm_rows(const std::string& dtype, const py::array& input, const py::object& order, const py::array& output,
                    const py::array& weight, const py::object& bias, float eps) {
  const DeviceArray device_input(input), device_output(output), device_weight(weight);
  const DeviceArray device_order = DeviceArray::optional(order), device_bias = DeviceArray::optional(bias);
  const Stream stream;
  norm({.dtype = parse_dtype(dtype),
        .input = device_input.as<float>(),
        .order = device_order.as<int32_t>(),
        .output = device_output.as<void>(),
        .weight = device_weight.as<float>(),
        .bias = device_bias.as<float>(),
        .rows = output.shape(0),
        .width = weight.size(),
        .ld = input.shape(1),
        .eps = eps},
       stream);
  stream.synchronize();
  return device_output.numpy();
}

py::array rotations(const py::array& positions, const py::array& inv_freq, float scale) {
  const DeviceArray device_positions(positions), device_freq(inv_freq);
  const DeviceArray output(py::array_t<float>({positions.size(), py::ssize_t{2}, inv_freq.size()}));
  const Stream stream;
  rotation_table(device_positions.as<int32_t>(), positions.size(), device_freq.as<float>(), inv_freq.size(), scale,
                 output.as<float>(), stream);
  stream.synchronize();
  return output.numpy();
}

py::tuple rope(const std::string& dtype, const py::array& qkv, const py::object& cos_sin, int64_t rotary_half,
               const py::object& q_norm, const py::object& k_norm, float eps, int64_t num_heads, const py::array& pool,
               int64_t num_layers, int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t layer,
               const py::array& rows, const py::array& tables, const py::array& token_rows) {
  const DeviceArray device_qkv(qkv), device_pool(pool), device_rows(rows), device_tables(tables), rows_of(token_rows);
  const DeviceArray angles = DeviceArray::optional(cos_sin), q_weight = DeviceArray::optional(q_norm),
                    k_weight = DeviceArray::optional(k_norm);
  const Stream stream;
  DeviceBatch batch{};
  batch.num_tokens = token_rows.size();
  batch.num_rows = rows.shape(0);
  batch.token_rows = rows_of.as<int32_t>();
  batch.rows = device_rows.as<BatchRow>();
  batch.tables = device_tables.as<int32_t>();
  KvView view{};
  view.num_layers = num_layers;
  view.num_kv_heads = num_kv_heads;
  view.head_dim = head_dim;
  view.block_size = block_size;
  view.base = device_pool.as<void>();
  rope_and_store({.dtype = parse_dtype(dtype),
                  .qkv = device_qkv.as<void>(),
                  .ld = qkv.shape(1),
                  .cos_sin = angles.as<float>(),
                  .rotary_half = rotary_half,
                  .q_norm = q_weight.as<float>(),
                  .k_norm = k_weight.as<float>(),
                  .eps = eps,
                  .num_heads = num_heads,
                  .pool = view,
                  .layer = layer},
                 batch, stream);
  stream.synchronize();
  return py::make_tuple(device_qkv.numpy(), device_pool.numpy());
}

py::array activate_rows(const std::string& dtype, const std::string& kind, bool gated, const py::array& x,
                        int64_t width) {
  const DeviceArray device_x(x);
  const Stream stream;
  activate(parse_dtype(dtype), parse_activation(kind), gated, device_x.as<void>(), x.shape(0), width, x.shape(1),
           stream);
  stream.synchronize();
  return device_x.numpy();
}

py::array add_arrays(const py::array& input, const py::array& output) {
  const DeviceArray device_input(input), device_output(output);
  const Stream stream;
  add(device_input.as<float>(), device_output.as<float>(), output.size(), stream);
  stream.synchronize();
  return device_output.numpy();
}

// Through pinned memory to the device and back.
py::array_t<uint32_t> copy_there_and_back(const py::array_t<uint32_t, py::array::c_style>& words) {
  const auto bytes = static_cast<size_t>(words.nbytes());
  const Memory there(Place::kPinned, bytes), device(Place::kDevice, bytes), back(Place::kPinned, bytes);
  std::memcpy(there.as<void>(), words.data(), bytes);
  const Stream stream;
  copy_words(there.as<void>(), device.as<void>(), words.nbytes(), stream);
  copy_words(device.as<void>(), back.as<void>(), words.nbytes(), stream);
  stream.synchronize();
  return py::array_t<uint32_t>(words.size(), back.as<uint32_t>());
}

py::array sum_of_parts(const py::array& parts) {
  const DeviceArray device_parts(parts), output(py::array_t<float>(parts.shape(1)));
  const Stream stream;
  sum_parts(device_parts.as<float>(), parts.shape(0), parts.shape(1), output.as<float>(), stream);
  stream.synchronize();
  return output.numpy();
}

}  // namespace

void register_elementwise(py::module_& module) {
  module.def("embed", &embed_rows, py::arg("format"), py::arg("type"), py::arg("data"), py::arg("n"), py::arg("k"),
             py::arg("ids"), py::arg("last_sampled"), py::arg("first"), py::arg("output"), py::arg("accumulate"));
  module.def("norm", &norm_rows, py::arg("dtype"), py::arg("input"), py::arg("order"), py::arg("output"),
             py::arg("weight"), py::arg("bias"), py::arg("eps"));
  module.def("rotation_table", &rotations, py::arg("positions"), py::arg("inv_freq"), py::arg("scale"));
  module.def("rope_and_store", &rope, py::arg("dtype"), py::arg("qkv"), py::arg("cos_sin"), py::arg("rotary_half"),
             py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"), py::arg("num_heads"), py::arg("pool"),
             py::arg("num_layers"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("block_size"),
             py::arg("layer"), py::arg("rows"), py::arg("tables"), py::arg("token_rows"));
  module.def("activate", &activate_rows, py::arg("dtype"), py::arg("kind"), py::arg("gated"), py::arg("x"),
             py::arg("width"));
  module.def("add", &add_arrays, py::arg("input"), py::arg("output"));
  module.def("copy_there_and_back", &copy_there_and_back, py::arg("words"));
  module.def("sum_parts", &sum_of_parts, py::arg("parts"));
}

}  // namespace fastserve::cuda
