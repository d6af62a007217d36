// The CUDA backend's functions for tests/cuda, which call them with NumPy arrays. The same bindings are linked with the
// kernels that nvcc compiled and with those that tests/simt emulates.
#include <pybind11/pybind11.h>

#include "common/check.h"
#include "register_all.h"

PYBIND11_MODULE(_kernels, module) {
  pybind11::register_local_exception<fastserve::Error>(module, "Error", PyExc_RuntimeError);
  fastserve::cuda::register_all(module);
}
