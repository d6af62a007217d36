// Ranks of one host.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "comm/communicator.h"
#include "comm/segment.h"

namespace fastserve {

inline constexpr int kMaxSharedRanks = 128;

// What the ranks of one communicator share. Whoever makes it keeps it until they have joined.
std::unique_ptr<SegmentFile> make_shared_memory(int size);

// Returns when all `size` ranks have come, each in a thread or process of its own; throws naming those that have not
// within two minutes (or the patience, if shorter).
std::unique_ptr<Communicator> join_shared_memory(const std::string& path, int rank, int size, const Member& self,
                                                 Patience patience);

// Ends the joining of `size` ranks, and every wait of those that have joined, with an Error that says this.
void abort_shared_memory(const std::string& path, int size, const std::string& reason);

// A communicator of these ranks of `parent`, which are on one host, in this order; null where they do not hold this
// rank. All of `parent` take part, each group of ranks with its own.
std::unique_ptr<Communicator> share_memory(Communicator& parent, std::span<const int> ranks);

}  // namespace fastserve
