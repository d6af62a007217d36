// Kernels that begin early, for tests/cuda/test_early_launch.py.
#include "backend/cuda/early_launch.h"

#include <pybind11/pybind11.h>

#include "backend/cuda/runtime_api.h"

namespace py = pybind11;

namespace fastserve::cuda {

void register_early_launch(py::module_& module) {
  module.def("kernels_begin_early", &kernels_begin_early);
  module.def("try_early_launches", [] {
    const Stream stream;
    return try_early_launches(stream);
  });
  module.def("early_launch_trial", [] {
    const Stream stream;
    return early_launch_trial(stream);
  });
}

}  // namespace fastserve::cuda
