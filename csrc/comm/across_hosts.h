// Ranks of several hosts: shared memory inside a host, messages between them.
#pragma once

#include <memory>
#include <span>

#include "comm/communicator.h"

namespace fastserve {

// The ranks of `flat`, which carries messages between any two. Those of one machine share memory, where `machines`
// [size] says which rank is on which. All ranks of `flat` take part.
std::unique_ptr<Communicator> across_hosts(std::unique_ptr<Communicator> flat, std::span<const uint64_t> machines);
std::unique_ptr<Communicator> across_hosts(std::unique_ptr<Communicator> flat);  // as its members say

}  // namespace fastserve
