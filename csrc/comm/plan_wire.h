// A BatchPlan as one flat buffer, and from rank 0 to all others: a header of counts and the plan's arrays, one after
// another. Integers and floats are this machine's.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "comm/communicator.h"
#include "runtime/plan.h"

namespace fastserve {

std::vector<std::byte> encode_plan(const BatchPlan& plan);

// Throws unless the buffer is exactly one plan. What the plan says is for validate() to check.
BatchPlan decode_plan(std::span<const std::byte> buffer);

// Gives the root's plan to all ranks. One broadcast for most plans, two for those of more than 4 KiB.
void broadcast_plan(Communicator& communicator, BatchPlan& plan, int root);

}  // namespace fastserve
