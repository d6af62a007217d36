// One function a file; module.cc calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace fastserve {

void register_runtime(pybind11::module_& module);
void register_sampler(pybind11::module_& module);
void register_cpu(pybind11::module_& module);
void register_matrix(pybind11::module_& module);
void register_attention(pybind11::module_& module);
void register_comm(pybind11::module_& module);

}  // namespace fastserve
