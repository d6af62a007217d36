// Attention by itself, for tests and measurements.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <tuple>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "bindings/arrays.h"
#include "bindings/register.h"
#include "common/buffer.h"

namespace py = pybind11;

namespace fastserve {

namespace {

// A job's tokens in a call: how many, where they begin, and its blocks.
using Piece = std::tuple<int64_t, int64_t, std::vector<int32_t>>;

class PyAttention {
 public:
  PyAttention(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, const std::string& kv_dtype,
              int64_t block_size, int64_t num_blocks, int threads)
      : num_heads_(num_heads),
        shape_{parse_kv_format(kv_dtype), 1, num_kv_heads, head_dim, block_size},
        num_blocks_(num_blocks),
        backend_(make_cpu_backend(threads)) {
    FS_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0 && head_dim > 0 && block_size > 0 && num_blocks > 0,
             "Attention: sizes must be positive, and num_heads a multiple of num_kv_heads");
    pool_ = Buffer(block_bytes() * num_blocks);
    backend_->set_kv_pool(shape_, pool_.as<char>());
  }

  py::array run(const Array<float>& qkv, const std::vector<Piece>& pieces) {
    prepare(qkv, pieces);
    store();
    attend();
    const int64_t width = num_heads_ * shape_.head_dim;
    std::vector<float> values(tokens_ * width);
    for (int64_t i = 0; i < tokens_; ++i) {
      std::memcpy(values.data() + i * width, output_.as<float>() + i * ld_output_, width * sizeof(float));
    }
    return to_array(std::move(values), {tokens_, width});
  }

  std::pair<double, double> seconds(const Array<float>& qkv, const std::vector<Piece>& pieces, int repeats) {
    prepare(qkv, pieces);
    const auto best = [&](auto body) {
      double least = 1e9;
      for (int i = 0; i < repeats; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        body();
        least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
      }
      return least;
    };
    const double storing = best([&] { store(); });
    return {storing, best([&] { attend(); })};
  }

  int64_t block_bytes() const { return backend_->block_bytes(shape_); }

 private:
  void prepare(const Array<float>& qkv, const std::vector<Piece>& pieces) {
    const int64_t width = (num_heads_ + 2 * shape_.num_kv_heads) * shape_.head_dim;
    FS_CHECK(qkv.ndim() == 2 && qkv.shape(1) == width, "Attention: qkv must be [tokens, ", width, "]");
    tables_.clear();
    rows_.clear();
    tokens_ = 0;
    for (const auto& [tokens, start, table] : pieces) {
      FS_CHECK(tokens > 0 && start >= 0 && start + tokens <= static_cast<int64_t>(table.size()) * shape_.block_size,
               "Attention: a row's table has no block for its last position");
      for (const int32_t block : table) {
        FS_CHECK(block >= 0 && block < num_blocks_, "Attention: no block ", block, " in ", num_blocks_);
      }
      tables_.push_back(table);
      rows_.push_back({tokens_, tokens, start, nullptr});
      tokens_ += tokens;
    }
    FS_CHECK(tokens_ == qkv.shape(0), "Attention: the rows have ", tokens_, " tokens, qkv ", qkv.shape(0));
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i].table = tables_[i].data();
    backend_->begin({.rows = rows_, .token_ids = {}, .positions = {}, .logit_tokens = {}});
    ld_ = round_up(width, kPad);
    ld_output_ = round_up(num_heads_ * shape_.head_dim, kPad);
    qkv_ = Buffer(tokens_ * ld_ * sizeof(float));
    output_ = Buffer(tokens_ * ld_output_ * sizeof(float));
    for (int64_t i = 0; i < tokens_; ++i) {
      std::memcpy(qkv_.as<float>() + i * ld_, qkv.data(i, 0), width * sizeof(float));
    }
  }
  void store() {
    backend_->rope_and_store({.qkv = qkv_.as<float>(),
                              .ld = ld_,
                              .cos_sin = nullptr,
                              .rotary_half = 0,
                              .q_norm = nullptr,
                              .k_norm = nullptr,
                              .eps = 0,
                              .num_heads = num_heads_,
                              .layer = 0});
  }
  void attend() {
    backend_->attention({.qkv = qkv_.as<float>(),
                         .ld = ld_,
                         .output = output_.as<float>(),
                         .ld_output = ld_output_,
                         .num_heads = num_heads_,
                         .query_group = num_heads_ / shape_.num_kv_heads,
                         .query_offset = 0,
                         .scale = 1.0f,
                         .layer = 0});
  }

  const int64_t num_heads_;
  const KvShape shape_;
  const int64_t num_blocks_;
  std::unique_ptr<Backend> backend_;
  Buffer pool_, qkv_, output_;
  std::vector<Row> rows_;
  std::vector<std::vector<int32_t>> tables_;
  int64_t tokens_ = 0, ld_ = 0, ld_output_ = 0;
};

}  // namespace

void register_attention(py::module_& module) {
  py::class_<PyAttention>(module, "Attention", "For tests and measurements: one layer's KV pool and attention over it.")
      .def(py::init<int64_t, int64_t, int64_t, const std::string&, int64_t, int64_t, int>(), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("kv_dtype"), py::arg("block_size"),
           py::arg("num_blocks"), py::arg("threads") = 1)
      .def("run", &PyAttention::run, py::arg("qkv"), py::arg("rows"),
           "Stores K and V of the rows, (tokens, start, blocks), and returns what their queries, taken as they are, "
           "attend to.")
      .def("seconds", &PyAttention::seconds, py::arg("qkv"), py::arg("rows"), py::arg("repeats"),
           "Of storing and of attending, the least of several.")
      .def_property_readonly("block_bytes", &PyAttention::block_bytes);
}

}  // namespace fastserve
