// The fake runtime's switches, for tests.
#include "fake_cudart/control.h"

#include <pybind11/pybind11.h>

#include "register_all.h"

namespace fastserve::cuda {

void register_control(pybind11::module_& module) {
  using namespace pybind11::literals;
  auto control = module.def_submodule("simt", "The emulated machine's switches; only there where it is emulated");
  control.def("configure", fake_cudart::configure, "eagerness"_a, "seed"_a);
  control.def("set_device_memory", fake_cudart::set_device_memory, "bytes"_a);
  control.def("check_errors", fake_cudart::check_errors);
  control.def("attributes_set", fake_cudart::attributes_set);
  control.def("carveouts_set", fake_cudart::carveouts_set);
  control.def("cluster_launches", fake_cudart::cluster_launches);
  control.def("lose_device", fake_cudart::lose_device, "function"_a, "after"_a);
  control.def("revive", fake_cudart::revive);
  control.def("set_compiled_for", fake_cudart::set_compiled_for, "architecture"_a);
  control.def("live_objects", fake_cudart::live_objects);
}

}  // namespace fastserve::cuda
