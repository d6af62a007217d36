#include "runtime/runtime.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>

#include "backend/device.h"
#include "backend/device_probe.h"
#include "bindings/arrays.h"
#include "bindings/communicator.h"
#include "bindings/plan.h"
#include "bindings/register.h"
#include "model/dequantize.h"
#include "runtime/group.h"

namespace py = pybind11;

namespace fastserve {

namespace {

// Reads a fastserve.loaders.spec.ModelSpec.
ModelSpec read_spec(const py::handle& spec) {
  static const std::map<std::string, Activation> kActivations = {{"silu", Activation::kSilu},
                                                                 {"gelu", Activation::kGelu},
                                                                 {"gelu_tanh", Activation::kGeluTanh},
                                                                 {"relu", Activation::kRelu}};
  const auto number = [&](const char* name) { return spec.attr(name).cast<int64_t>(); };
  const auto flag = [&](const char* name) { return spec.attr(name).cast<bool>(); };
  const auto norm = spec.attr("norm").cast<std::string>();
  const auto activation = kActivations.find(spec.attr("activation").cast<std::string>());
  FS_CHECK(norm == "rms" || norm == "layer", "norm must be rms or layer, got '", norm, "'");
  FS_CHECK(activation != kActivations.end(), "activation must be silu, gelu, gelu_tanh or relu");
  return {.vocab_size = number("vocab_size"),
          .hidden_size = number("hidden_size"),
          .num_layers = number("num_layers"),
          .num_heads = number("num_heads"),
          .num_kv_heads = number("num_kv_heads"),
          .head_dim = number("head_dim"),
          .intermediate_size = number("intermediate_size"),
          .max_position = number("max_position"),
          .rms_norm = norm == "rms",
          .norm_eps = spec.attr("norm_eps").cast<float>(),
          .activation = activation->second,
          .gated_mlp = flag("gated_mlp"),
          .rope_inv_freq = spec.attr("rope_inv_freq").cast<std::vector<float>>(),
          .rope_scale = spec.attr("rope_scale").cast<float>(),
          .position_offset = number("position_offset"),
          .parallel_residual = flag("parallel_residual"),
          .qk_norm = flag("qk_norm"),
          .qkv_bias = flag("qkv_bias"),
          .out_bias = flag("out_bias"),
          .mlp_bias = flag("mlp_bias"),
          .tied_embeddings = flag("tied_embeddings")};
}

// Reads a fastserve.sharding.Shard; None is all of the model.
Shard read_shard(const py::handle& shard, const ModelSpec& spec) {
  if (shard.is_none()) return Shard::whole(spec);
  const auto vocab = shard.attr("vocab");
  const auto first = vocab.attr("start").cast<int64_t>();
  return {.query_group = shard.attr("query_group").cast<int64_t>(),
          .query_offset = shard.attr("query_offset").cast<int64_t>(),
          .first_token = first,
          .num_tokens = vocab.attr("stop").cast<int64_t>() - first,
          .first_stage = shard.attr("first_stage").cast<bool>(),
          .last_stage = shard.attr("last_stage").cast<bool>(),
          .adds_biases = shard.attr("adds_biases").cast<bool>()};
}

// A communicator of a fastserve.links.Links, or null.
Communicator* read_link(const py::handle& links, const char* name) {
  if (links.is_none()) return nullptr;
  const py::object link = links.attr(name);
  return link.is_none() ? nullptr : link.cast<PyCommunicator&>().communicator.get();
}

// (plan_id, tokens [S], logprobs [S], top_tokens [S, K], top_logprobs [S, K], logits [L, vocab] or None, seconds,
// {sample: error}, copies [K], copy_seconds [K])
py::tuple write_result(StepResult result, int64_t vocab_size) {
  const auto count = static_cast<py::ssize_t>(result.sampled.size());
  size_t alternatives = 0;
  for (const Sampled& s : result.sampled) alternatives = std::max(alternatives, s.top.size());
  std::vector<int32_t> tokens(count), top_tokens(count * alternatives, -1);
  std::vector<float> logprobs(count), top_logprobs(count * alternatives, std::nanf(""));
  py::dict errors;
  for (py::ssize_t i = 0; i < count; ++i) {
    const Sampled& s = result.sampled[i];
    tokens[i] = s.token;
    logprobs[i] = s.logprob;
    if (!s.error.empty()) errors[py::int_(i)] = s.error;
    for (size_t j = 0; j < s.top.size(); ++j) {
      top_tokens[i * alternatives + j] = s.top[j].first;
      top_logprobs[i * alternatives + j] = s.top[j].second;
    }
  }
  std::vector<int32_t> copies;
  std::vector<float> copy_seconds;
  for (const FinishedCopy& copy : result.copies) {
    copies.push_back(copy.copy);
    copy_seconds.push_back(static_cast<float>(copy.seconds));
  }
  const auto k = static_cast<py::ssize_t>(alternatives), copied = static_cast<py::ssize_t>(copies.size());
  py::object logits = py::none();
  if (!result.logits.empty()) {
    const auto rows = static_cast<py::ssize_t>(result.logits.size() / vocab_size);
    logits = to_array(std::move(result.logits), {rows, vocab_size});
  }
  return py::make_tuple(result.plan_id, to_array(std::move(tokens), {count}), to_array(std::move(logprobs), {count}),
                        to_array(std::move(top_tokens), {count, k}), to_array(std::move(top_logprobs), {count, k}),
                        logits, result.seconds, errors, to_array(std::move(copies), {copied}),
                        to_array(std::move(copy_seconds), {copied}));
}

// The runtime, with what it takes to shape its results and to outlive a fork.
struct PyRuntime {
  PyRuntime(const py::handle& spec, const std::string& dtype, const std::string& kv_dtype, int64_t block_size,
            int64_t num_blocks, int64_t max_tokens, int threads, int64_t num_host_blocks, int64_t swap_bandwidth,
            const std::map<std::string, std::string>& formats, const py::object& shard, py::object given_links,
            const std::string& device)
      : links(std::move(given_links)),
        model(read_spec(spec)),
        options{device,     parse_dtype(dtype), parse_kv_format(kv_dtype),
                block_size, num_blocks,         max_tokens,
                threads,    num_host_blocks,    swap_bandwidth,
                {}} {
    for (const auto& [name, format] : formats) options.formats[name] = parse_weight_format(format);
    FS_CHECK(block_size > 0 && num_blocks > 0 && max_tokens > 0 && threads >= 0,
             "block_size, num_blocks and max_tokens must be positive, threads not negative");
    FS_CHECK(num_host_blocks >= 0 && swap_bandwidth >= 0, "num_host_blocks and swap_bandwidth must not be negative");
    const Shard part = read_shard(shard, model);
    const Neighbours neighbours{read_link(links, "tensor"), read_link(links, "receives"), read_link(links, "sends")};
    {
      py::gil_scoped_release release;
      runtime = std::make_unique<Runtime>(model, part, options, neighbours);
    }
    if (links.is_none()) return;
    group.emplace(GroupLinks{*read_link(links, "plans"), *read_link(links, "answers"),
                             links.attr("sampler").cast<int>(), links.attr("timeout").cast<double>()});
    if (group->plans.rank() == 0 && group->plans.size() > 1) leader.emplace(*runtime, *group);
  }
  ~PyRuntime() {
    if (getpid() != process) {  // after a fork: the threads are the parent's, and cannot be joined here
      static_cast<void>(runtime.release());
      return;
    }
    py::gil_scoped_release release;
    runtime.reset();
  }

  const py::object links;
  ModelSpec model;
  RuntimeOptions options;
  std::optional<GroupLinks> group;
  std::unique_ptr<Runtime> runtime;
  std::optional<Leader> leader;
  const pid_t process = getpid();
};

}  // namespace

void register_runtime(py::module_& module) {
  py::class_<PyRuntime>(module, "Runtime", "Executes batch plans in submission order on a thread of its own.")
      .def(py::init<const py::handle&, const std::string&, const std::string&, int64_t, int64_t, int64_t, int, int64_t,
                    int64_t, const std::map<std::string, std::string>&, const py::object&, py::object,
                    const std::string&>(),
           py::arg("spec"), py::arg("dtype"), py::arg("kv_dtype"), py::arg("block_size"), py::arg("num_blocks"),
           py::arg("max_tokens"), py::arg("threads"), py::arg("num_host_blocks") = 0, py::arg("swap_bandwidth") = 0,
           py::arg("formats") = std::map<std::string, std::string>(), py::arg("shard") = py::none(),
           py::arg("links") = py::none(), py::arg("device") = "cpu")
      .def(
          "load_tensor",
          [](PyRuntime& self, const std::string& name, const std::string& type, const std::vector<int64_t>& shape,
             const Array<uint8_t>& data, int64_t first_row) {
            const SourceType source = parse_source_type(type);
            const uint8_t* bytes = data.data();
            const int64_t size = data.size();
            py::gil_scoped_release release;
            self.runtime->load_tensor(name, source, shape, first_row, bytes, size);
          },
          py::arg("name"), py::arg("dtype"), py::arg("shape"), py::arg("data").noconvert(), py::arg("first_row") = 0,
          "Stores one tensor, or its rows from `first_row` on, given as bytes, under its canonical name.")
      .def("finish_loading", [](PyRuntime& self) { self.runtime->finish_loading(); })
      .def(
          "free_bytes",
          [](PyRuntime& self, int64_t rows, int64_t positions) {
            py::gil_scoped_release release;
            return self.runtime->free_bytes(rows, positions);
          },
          py::arg("rows"), py::arg("positions"),
          "Of the device, beside the largest iteration; -1 where its memory is the host's.")
      .def(
          "set_pools",
          [](PyRuntime& self, int64_t num_blocks, int64_t num_host_blocks) {
            py::gil_scoped_release release;
            self.runtime->set_pools(num_blocks, num_host_blocks);
          },
          py::arg("num_blocks"), py::arg("num_host_blocks"), "Other pools, which are empty.")
      .def(
          "submit",
          [](PyRuntime& self, const py::handle& plan, bool logits) {
            BatchPlan native = read_plan(plan, logits);
            py::gil_scoped_release release;
            self.leader ? self.leader->submit(std::move(native)) : self.runtime->submit(std::move(native));
          },
          py::arg("plan"), py::arg("logits") = false)
      .def(
          "poll",
          [](PyRuntime& self, double seconds) -> py::object {
            std::optional<StepResult> result;
            {
              py::gil_scoped_release release;
              result = self.leader ? self.leader->poll(seconds) : self.runtime->poll(seconds);
            }
            if (!result) return py::none();
            if (result->error) std::rethrow_exception(result->error);
            return write_result(std::move(*result), self.model.vocab_size);
          },
          py::arg("seconds"), "The oldest result, or None after `seconds`; negative waits as long as it takes.")
      .def(
          "follow",
          [](PyRuntime& self) {
            FS_CHECK(self.group && self.group->plans.rank() != 0, "only ranks other than 0 follow");
            py::gil_scoped_release release;
            follow(*self.runtime, *self.group);
          },
          "Runs what rank 0 submits, until it closes.")
      .def(
          "close",
          [](PyRuntime& self) {
            if (!self.leader) return;
            py::gil_scoped_release release;
            self.leader->close();
          },
          "Rank 0 lets the others go, once all plans have returned. Alone there is nobody.")
      .def(
          "read_block",
          [](const PyRuntime& self, bool host, int64_t block) {
            const auto bytes = self.runtime->block(host ? Tier::kHost : Tier::kDevice, block);
            return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
          },
          py::arg("host"), py::arg("block"), "For tests: the bytes of one KV block, which nothing may be writing.")
      .def_property_readonly("instruction_set", [](const PyRuntime& self) { return self.runtime->instruction_set(); })
      .def_property_readonly("threads", [](const PyRuntime& self) { return self.runtime->threads(); })
      .def_property_readonly("weight_bytes", [](const PyRuntime& self) { return self.runtime->weight_bytes(); });

  module.def(
      "coalesce",
      [](const std::vector<std::pair<int32_t, int32_t>>& moves) {
        std::vector<CopyRow> rows;
        for (const auto& [source, destination] : moves) rows.push_back({0, kOffload, source, destination});
        std::vector<std::tuple<int32_t, int32_t, int32_t>> runs;
        for (const BlockRun& run : coalesce(rows)) runs.emplace_back(run.source, run.destination, run.count);
        return runs;
      },
      py::arg("moves"), "For tests: (source, destination) blocks as the runs (source, destination, count) they make.");

  module.def(
      "block_bytes",
      [](const py::handle& spec, const std::string& kv_dtype, int64_t block_size, const std::string& device) {
        return block_bytes(device, Runtime::kv_shape(read_spec(spec), parse_kv_format(kv_dtype), block_size));
      },
      py::arg("spec"), py::arg("kv_dtype"), py::arg("block_size"), py::arg("device") = "cpu",
      "Bytes of one KV block of a model on a device.");

  // The clock is the device's, whoever asks for it.
  module.def(
      "time_batches",
      [](const std::string& device, int64_t most) {
        FS_CHECK(most > 0, "time_batches: at least one batch, got ", most);
        make_device_probe(device, DType::kBFloat16, 0)->time_batches(most);
      },
      py::arg("device"), py::arg("most"),
      "For benchmarks: from now on, times the batches of all runtimes on the device. None may be under way.");
  module.def(
      "take_batch_times",
      [](const std::string& device) {
        std::vector<std::pair<double, double>> spans;
        for (const BatchSpan& span : make_device_probe(device, DType::kBFloat16, 0)->take_times()) {
          spans.emplace_back(span.begin, span.end);
        }
        return spans;
      },
      py::arg("device"), "When the kernels of those batches began and ended, in seconds since the first; ends it.");
}

}  // namespace fastserve
