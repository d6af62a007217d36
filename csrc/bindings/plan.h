// fastserve.types.BatchPlan and back.
#pragma once

#include <pybind11/pybind11.h>

#include "runtime/plan.h"

namespace fastserve {

// Throws, naming the field, when an array has the wrong type or length.
BatchPlan read_plan(const pybind11::handle& plan, bool return_logits);
pybind11::object write_plan(const BatchPlan& plan);

}  // namespace fastserve
