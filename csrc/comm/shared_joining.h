// How ranks of one host come together in the memory that they will share, and how that is called off.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/segment.h"
#include "comm/shared_layout.h"

namespace fastserve {

struct Joined {
  std::unique_ptr<Segment> segment;
  std::vector<Member> members;  // by rank
};

// Returns when all `size` ranks have come; throws naming those that have not within two minutes, or the patience.
Joined join_segment(const std::string& path, int rank, int size, const Member& self, const Patience& patience);

// Ends the joining, and every wait of those that have joined, with an Error that says this.
void abort_all(Segment& segment, const SharedLayout& layout, const std::string& reason);

}  // namespace fastserve
