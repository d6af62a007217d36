// Sampling on NumPy arrays.
#include "backend/cuda/sampling.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <vector>

#include "backend/backend.h"
#include "device_array.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

template <class T>
Memory upload(const std::vector<T>& values) {
  Memory memory(Place::kDevice, values.size() * sizeof(T));
  if (!values.empty()) check(cudaMemcpy(memory.as<void>(), values.data(), memory.bytes(), cudaMemcpyHostToDevice));
  check(cudaStreamSynchronize(nullptr));  // for which other streams do not wait
  return memory;
}

template <class T>
std::vector<T> download(const Memory& memory, size_t count) {
  std::vector<T> values(count);
  if (count > 0) check(cudaMemcpy(values.data(), memory.as<void>(), count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

// counts [tables, count_table_size]; a row's `table` is one of them, or -1.
struct Request {
  SampleRow row;
  int64_t table = -1;
};

// (results as (token, logprob, error) tuples, alternatives of each, last_sampled, counts)
py::tuple sample_rows(const py::array& logits, int64_t vocab, const std::vector<Request>& requests,
                      const std::vector<std::pair<int32_t, float>>& biases, const std::vector<int32_t>& stop_tokens,
                      const py::array& last_sampled, const py::array& counts, bool draws) {
  const DeviceArray device_logits(logits), device_last(last_sampled), device_counts(counts);
  std::vector<SampleRow> rows;
  for (const Request& request : requests) {
    rows.push_back(request.row);
    if (request.table >= 0) {
      rows.back().counts = device_counts.as<uint32_t>() + request.table * count_table_size(vocab);
    }
  }
  std::vector<SampleBias> device_biases;
  for (const auto& [token, bias] : biases) device_biases.push_back({token, bias});
  const auto count = static_cast<int64_t>(rows.size());
  const std::vector<SampleResult> no_results(rows.size(), {-7, 0.0f, SampleError::kNone});
  const std::vector<TopToken> no_tops(rows.size() * kMaxTop, {-7, 0.0f});
  const auto bytes = static_cast<size_t>(sample_workspace(count, vocab, static_cast<int64_t>(biases.size())));
  const Memory row_memory = upload(rows), bias_memory = upload(device_biases), stop_memory = upload(stop_tokens),
               result_memory = upload(no_results), top_memory = upload(no_tops),
               workspace = upload(std::vector<unsigned char>(bytes, 0xa5));  // nothing may be expected of it
  const Stream stream;
  sample({.num_rows = count,
          .vocab = vocab,
          .ld = logits.shape(1),
          .draws = draws,
          .logits = device_logits.as<float>(),
          .rows = row_memory.as<SampleRow>(),
          .biases = bias_memory.as<SampleBias>(),
          .stop_tokens = stop_memory.as<int32_t>(),
          .last_sampled = device_last.as<int32_t>(),
          .results = result_memory.as<SampleResult>(),
          .tops = top_memory.as<TopToken>(),
          .workspace = workspace.as<void>()},
         stream);
  stream.synchronize();
  py::list results, tops;
  const auto top_tokens = download<TopToken>(top_memory, no_tops.size());
  size_t next = 0;
  for (const SampleResult& result : download<SampleResult>(result_memory, rows.size())) {
    results.append(py::make_tuple(result.token, result.logprob, std::string(describe(result.error))));
    py::list top;
    for (int i = 0; i < kMaxTop; ++i, ++next) {
      if (top_tokens[next].token >= 0) top.append(py::make_tuple(top_tokens[next].token, top_tokens[next].logprob));
    }
    tops.append(top);
  }
  return py::make_tuple(results, tops, device_last.numpy(), device_counts.numpy());
}

// tokens: a prompt, what came out after it, and what others have seen, as jobs lie one after another.
py::array count_history(int64_t vocab, const py::array& tokens, int64_t prompt, int64_t outputs) {
  const DeviceArray device_tokens(tokens);
  py::array_t<uint32_t> poison(count_table_size(vocab));
  std::memset(poison.mutable_data(), 0xa5, static_cast<size_t>(poison.nbytes()));
  const DeviceArray counts(poison);
  const Stream stream;
  count_tokens(counts.as<uint32_t>(), vocab, device_tokens.as<int32_t>(), prompt, device_tokens.as<int32_t>() + prompt,
               outputs, stream);
  stream.synchronize();
  return counts.numpy();
}

}  // namespace

void register_sampling(py::module_& module) {
  const auto row = [](auto member) {
    return std::pair([member](const Request& request) { return request.row.*member; },
                     [member](Request& request, const std::decay_t<decltype(SampleRow{}.*member)>& value) {
                       request.row.*member = value;
                     });
  };
  py::class_<Request> request(module, "SampleRow");
  request.def(py::init<>()).def_readwrite("table", &Request::table);
  request.def("set_temperature",
              [](Request& r, float temperature, float min_p) { r.row.set_temperature(temperature, min_p); });
  const auto property = [&](const char* name, auto member) {
    const auto [get, set] = row(member);
    request.def_property(name, get, set);
  };
  property("logits", &SampleRow::logits);
  property("slot", &SampleRow::slot);
  property("output_index", &SampleRow::output_index);
  property("seed", &SampleRow::seed);
  property("top_k", &SampleRow::top_k);
  property("top_p", &SampleRow::top_p);
  property("logprobs", &SampleRow::logprobs);
  property("bias", &SampleRow::bias);
  property("biases", &SampleRow::biases);
  property("stop", &SampleRow::stop);
  property("stops", &SampleRow::stops);
  property("repetition_penalty", &SampleRow::repetition_penalty);
  property("presence_penalty", &SampleRow::presence_penalty);
  property("frequency_penalty", &SampleRow::frequency_penalty);
  module.def("sample", &sample_rows, py::arg("logits"), py::arg("vocab"), py::arg("rows"), py::arg("biases"),
             py::arg("stop_tokens"), py::arg("last_sampled"), py::arg("counts"), py::arg("draws") = true);
  module.def("count_tokens", &count_history, py::arg("vocab"), py::arg("tokens"), py::arg("prompt"),
             py::arg("outputs"));
}

}  // namespace fastserve::cuda
