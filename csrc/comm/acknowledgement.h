// What each rank says of a plan it has executed, and what rank 0 makes of it. Sampled tokens are not in it: whoever
// samples is rank 0, or tells it by itself.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "comm/communicator.h"
#include "runtime/plan.h"

namespace fastserve {

struct Acknowledgement {
  int64_t plan_id = 0;
  double seconds = 0;                // of the iteration
  std::vector<FinishedCopy> copies;  // on this rank, since its last acknowledgement
  std::string error;                 // why the plan failed; empty: it did not
};

// Rank 0's side; it has to see every plan, in order.
class Acknowledgements {
 public:
  // Waits for all other ranks' word on the plan that is `own`'s, and returns what holds for all: the longest time, and
  // the copies that every rank has now finished, each with its longest time. Throws when a rank's plan failed or was
  // another one, naming the rank.
  Acknowledgement gather(Communicator& communicator, const Acknowledgement& own);

 private:
  struct Pending {
    int ranks = 0;  // that have finished it
    double seconds = 0;
  };
  std::unordered_map<int32_t, Pending> pending_;
};

// The other ranks' side.
void send_acknowledgement(Communicator& communicator, const Acknowledgement& own);

}  // namespace fastserve
