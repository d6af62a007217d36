// Whether products by warpgroups are admitted, for tests/cuda/test_warpgroups.py.
#include "backend/cuda/warpgroup_trial.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/runtime_api.h"

namespace py = pybind11;

namespace fastserve::cuda {

namespace {

using Verdict = std::pair<bool, std::string>;

// Stand-ins made of the kernels: "right"; "one bit", or a few, of the last row of many are others; "onto", where it is
// added to what is there; "cannot"; "refused" by the device.
Verdict compare(const std::string& dtype, const std::string& kind) {
  Stream stream;
  const Memory workspace(Place::kDevice, kGemmWorkspace);
  const std::vector<float> ones(1 << 14, 1.0f);
  const Memory bias(Place::kDevice, ones.size() * sizeof(float));
  check(cudaMemcpy(bias.as<void>(), ones.data(), bias.bytes(), cudaMemcpyHostToDevice));
  check(cudaStreamSynchronize(nullptr));  // for which other streams do not wait
  const auto product = [&](GemmKernel kernel, const GemmCall& call, cudaStream_t queue) {
    if (kind == "cannot") return false;
    if (kind == "refused") check(cudaErrorInvalidValue);
    GemmCall changed = call;
    if (kind == "onto" && call.accumulate) changed.bias = bias.as<float>();
    gemm_with(kernel, changed, queue);
    if (kind == "one bit" && kernel == GemmKernel::kWarpgroup192 && call.m > 100) {
      changed.m = 1;
      changed.input = static_cast<const uint16_t*>(call.input) + (call.m - 1) * call.ld_input;
      changed.output = static_cast<char*>(call.output) + (call.m - 1) * call.ld_output * (call.wide ? 4 : 2);
      changed.weight.n = 1;
      changed.bias = bias.as<float>();
      gemm_with(GemmKernel::kRows8, changed, queue);
    }
    return true;
  };
  WarpgroupTrial trial = compare_warpgroups(parse_dtype(dtype), workspace.as<void>(), stream, product);
  stream.synchronize();
  return {trial.admitted, trial.verdict};
}

}  // namespace

void register_warpgroup_trial(py::module_& module) {
  module.def("has_warpgroups", &has_warpgroups);
  module.def("compare_warpgroups", &compare, py::arg("dtype"), py::arg("kind"));
  module.def("warpgroups_admitted", [](const std::string& dtype) { return warpgroups_admitted(parse_dtype(dtype)); });
  module.def("try_warpgroups", [](const std::string& dtype) {
    const Stream stream;
    const Memory workspace(Place::kDevice, kGemmWorkspace);
    const WarpgroupTrial& trial = try_warpgroups(parse_dtype(dtype), workspace.as<void>(), stream);
    return Verdict{trial.admitted, trial.verdict};
  });
}

}  // namespace fastserve::cuda
