// What each rank says of a plan it has executed, and what rank 0 makes of it. Sampled tokens are not in it: whoever
// samples is rank 0, or tells it by itself. Nor are failures, which end the group.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "comm/communicator.h"
#include "runtime/plan.h"

namespace fastserve {

struct Acknowledgement {
  int64_t plan_id = 0;
  double seconds = 0;                // of the iteration
  std::vector<FinishedCopy> copies;  // on this rank, since its last acknowledgement
};

// Rank 0's side; it has to see every plan, in order.
class Acknowledgements {
 public:
  // Waits for all other ranks' word on the plan that is `own`'s, and returns what holds for all: the longest time, and
  // the copies that every rank has now finished, each with its longest time. Nothing where the time is up before all
  // have begun to answer; then the next call has to be for the same plan. Throws when a rank acknowledges another one,
  // naming the rank.
  std::optional<Acknowledgement> gather(Communicator& communicator, const Acknowledgement& own,
                                        TimePoint until = kForever);

  // The first rank that the last call was in vain for.
  const Member& missing(const Communicator& communicator) const;

  // The first message of each acknowledgement; one of its copies follows where there are some.
  struct Head {
    int64_t plan_id;
    double seconds;
    uint64_t copies;
  };

 private:
  struct Pending {
    int ranks = 0;  // that have finished it
    double seconds = 0;
  };
  std::unordered_map<int32_t, Pending> pending_;
  std::vector<Head> heads_;        // by rank, of the plan that is waited for
  std::vector<Request> requests_;  // for those of all ranks but 0
};

// The other ranks' side.
void send_acknowledgement(Communicator& communicator, const Acknowledgement& own);

}  // namespace fastserve
