// Paged attention on NumPy arrays. Elements of 16 bits come as uint16.
#include <pybind11/numpy.h>

#include <string>

#include "backend/backend.h"
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/kernels.h"
#include "device_array.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

// A shard of a layer's heads over a pool.
class PagedAttention {
 public:
  PagedAttention(const std::string& dtype, const py::array& pool, int64_t num_layers, int64_t num_kv_heads,
                 int64_t head_dim, int64_t block_size, int64_t layer, int64_t num_heads, int64_t query_group,
                 int64_t query_offset, float scale, int64_t decodes, int64_t segments)
      : pool_(pool),
        workspace_(Place::kDevice,
                   static_cast<size_t>(attention_workspace(
                       num_heads, {{parse_kv_format(dtype), num_layers, num_kv_heads, head_dim, block_size}}, decodes,
                       segments))) {
    call_.dtype = parse_dtype(dtype);
    call_.num_heads = num_heads;
    call_.query_group = query_group;
    call_.query_offset = query_offset;
    call_.scale = scale;
    call_.pool = {{{parse_kv_format(dtype), num_layers, num_kv_heads, head_dim, block_size}}, pool_.as<void>()};
    call_.layer = layer;
    call_.workspace = workspace_.as<void>();
  }

  // block_warps or splits of 0 leave the choice to attention(), which has none for float32.
  py::array run(const py::array& qkv, const py::array& output, const py::array& rows, const py::array& tables,
                const py::array& token_rows, const py::array& decode_rows, const py::array& first_segments,
                const py::array& tiles, int64_t max_context, int block_warps, int64_t splits) {
    const DeviceArray device_qkv(qkv), device_output(output), device_rows(rows), device_tables(tables);
    const DeviceArray device_token_rows(token_rows), device_decode_rows(decode_rows), device_tiles(tiles);
    const DeviceArray device_first_segments(first_segments);
    call_.qkv = device_qkv.as<void>();
    call_.ld = qkv.shape(1);
    call_.output = device_output.as<void>();
    call_.ld_output = output.shape(1);
    DeviceBatch batch{};
    batch.num_tokens = qkv.shape(0);
    batch.num_rows = rows.shape(0);
    batch.num_decodes = decode_rows.size();
    batch.max_context = max_context;
    batch.num_tiles = tiles.shape(0);
    batch.token_rows = device_token_rows.as<int32_t>();
    batch.rows = device_rows.as<BatchRow>();
    batch.tables = device_tables.as<int32_t>();
    batch.decode_rows = device_decode_rows.as<int32_t>();
    batch.first_segments = device_first_segments.as<int32_t>();
    batch.tiles = device_tiles.as<PrefillTile>();
    const Stream stream;
    if (call_.dtype == DType::kFloat32 || block_warps == 0 || splits == 0) {
      attention(call_, batch, stream);
    } else {
      const AttentionShape shape = attention_shape(call_, batch);
      if (batch.num_tiles > 0) {
        attention_prefill(call_.dtype, shape, batch.tiles, batch.num_tiles, block_warps, stream);
      }
      if (batch.num_decodes > 0) {
        attention_decode(call_.dtype, shape, batch, splits, call_.workspace, stream);
      }
    }
    stream.synchronize();
    return device_output.numpy();
  }

 private:
  DeviceArray pool_;
  Memory workspace_;
  AttentionCall call_{};
};

}  // namespace

void register_attention(py::module_& module) {
  module.attr("PREFILL_TILE") = kPrefillTile;
  module.def(
      "attention_workspace",
      [](const std::string& dtype, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t decodes,
         int64_t segments) {
        const KvLayout pool{{parse_kv_format(dtype), 1, num_kv_heads, head_dim, 16}};
        return attention_workspace(num_heads, pool, decodes, segments);
      },
      py::arg("dtype"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("decodes"),
      py::arg("segments"));
  py::class_<PagedAttention>(module, "PagedAttention")
      .def(py::init<const std::string&, const py::array&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, float, int64_t, int64_t>(),
           py::arg("dtype"), py::arg("pool"), py::arg("num_layers"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("block_size"), py::arg("layer"), py::arg("num_heads"), py::arg("query_group"),
           py::arg("query_offset"), py::arg("scale"), py::arg("decodes"), py::arg("segments"))
      .def("run", &PagedAttention::run, py::arg("qkv"), py::arg("output"), py::arg("rows"), py::arg("tables"),
           py::arg("token_rows"), py::arg("decode_rows"), py::arg("first_segments"), py::arg("tiles"),
           py::arg("max_context"), py::arg("block_warps") = 0, py::arg("splits") = 0);
}

}  // namespace fastserve::cuda
