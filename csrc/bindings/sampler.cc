#include "model/sampler.h"

#include <pybind11/stl.h>

#include "backend/cpu/kernels.h"
#include "bindings/arrays.h"
#include "bindings/register.h"
#include "model/philox.h"

namespace py = pybind11;

namespace fastserve {

namespace {

TokenCounts count_tokens(const std::vector<int32_t>& prompt, const std::vector<int32_t>& output, int64_t vocab) {
  TokenCounts counts;
  for (const auto* tokens : {&prompt, &output}) {
    for (const int32_t token : *tokens) FS_CHECK(token >= 0 && token < vocab, "token ", token, " is not in the logits");
  }
  for (const int32_t token : prompt) counts.add_prompt(token);
  for (const int32_t token : output) counts.add_output(token);
  return counts;
}

std::vector<float> copy(const Array<float>& logits) { return {logits.data(), logits.data() + logits.size()}; }

}  // namespace

// The sampler by itself, for tests against independent implementations.
void register_sampler(py::module_& module) {
  py::class_<SamplingParams>(module, "SamplingParams")
      .def(py::init<>())
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("bias", &SamplingParams::bias)
      .def_readwrite("stop_tokens", &SamplingParams::stop_tokens);
  module.def(
      "sample",
      [](const Array<float>& logits, const SamplingParams& params, const std::vector<int32_t>& prompt,
         const std::vector<int32_t>& output) {
        auto copied = copy(logits);
        const auto counts = count_tokens(prompt, output, logits.size());
        const Sampled s =
            sample(cpu::select_kernels().logits, copied, params, counts, static_cast<int64_t>(output.size()));
        return py::make_tuple(s.token, s.logprob, s.top);
      },
      py::arg("logits"), py::arg("params"), py::arg("prompt") = std::vector<int32_t>{},
      py::arg("output") = std::vector<int32_t>{}, "(token, logprob, [(token, logprob)]) for one row of logits.");
  module.def(
      "distribution",
      [](const Array<float>& logits, const SamplingParams& params, const std::vector<int32_t>& prompt,
         const std::vector<int32_t>& output) {
        auto copied = copy(logits);
        const auto counts = count_tokens(prompt, output, logits.size());
        auto result =
            distribution(cpu::select_kernels().logits, copied, params, counts, static_cast<int64_t>(output.size()));
        const auto size = static_cast<py::ssize_t>(result.size());
        return to_array(std::move(result), {size});
      },
      py::arg("logits"), py::arg("params"), py::arg("prompt") = std::vector<int32_t>{},
      py::arg("output") = std::vector<int32_t>{}, "The probabilities a token is drawn with.");
  module.def("philox", &philox, py::arg("counter"), py::arg("key"), "Philox4x32-10 of one counter.");
  module.def("uniform", &uniform, py::arg("seed"), py::arg("index"), "The draw of one output position.");
}

}  // namespace fastserve
