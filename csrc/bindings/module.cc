#include "bindings/register.h"
#include "comm/communicator.h"
#include "common/check.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "FastServe's native runtime";
  const auto error = pybind11::register_exception<fastserve::Error>(module, "Error", PyExc_RuntimeError);
  pybind11::register_exception<fastserve::GroupError>(module, "GroupError", error);
  fastserve::register_runtime(module);
  fastserve::register_sampler(module);
  fastserve::register_cpu(module);
  fastserve::register_matrix(module);
  fastserve::register_attention(module);
  fastserve::register_comm(module);
}
