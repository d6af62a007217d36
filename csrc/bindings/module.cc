#include "bindings/register.h"
#include "common/check.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "FastServe's native runtime";
  pybind11::register_exception<fastserve::Error>(module, "Error", PyExc_RuntimeError);
  fastserve::register_runtime(module);
  fastserve::register_sampler(module);
  fastserve::register_cpu(module);
  fastserve::register_matrix(module);
  fastserve::register_attention(module);
  fastserve::register_comm(module);
}
