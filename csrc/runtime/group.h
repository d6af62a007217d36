// One executor made of the runtimes of all ranks: rank 0 leads, the others follow.
//
//   rank 0:   submit ──▶ plan to all ──▶ its own runtime          poll ◀── its own result ◀── the others' word on it
//   others:              plan arrives ─▶ their runtime ─▶ result ─▶ acknowledgement (and samples, from the last stage)
//
// Plans reach every rank when they are submitted, so that copies start everywhere at once, ahead of the activations.
//
// A group fails as a whole. When a rank is gone, or a plan fails on any of them (though it were the same way on all: a
// rank cannot know), every wait of every rank ends with a GroupError that says which rank it was, where and why, and
// everything after that throws the same.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "comm/acknowledgement.h"
#include "comm/communicator.h"
#include "runtime/runtime.h"

namespace fastserve {

// Ways between all ranks, of whom there are several, each used by one thread of a rank at a time.
struct GroupLinks {
  Communicator& plans;                                       // from rank 0
  Communicator& answers;                                     // to rank 0
  int sampler;                                               // the rank that tells rank 0 the samples; 0: it has them
  double timeout = std::numeric_limits<double>::infinity();  // seconds that rank 0 waits for another that has work
};

class Leader {
 public:
  Leader(Runtime& runtime, const GroupLinks& links);

  // As Runtime's; submit and poll may be called from two threads. With a sampler of its own, a job must not be in two
  // plans in flight: -1 is made the token that is known, since the first stage does not hear what the last one samples.
  // When it throws an Error that is no GroupError, nothing has happened on any rank.
  void submit(BatchPlan plan);
  // A copy is finished when it is so on all ranks; the time is the slowest rank's. Throws a GroupError where Runtime's
  // would return one, and one that names the rank whose word on the oldest plan does not come within the timeout.
  std::optional<StepResult> poll(double seconds);
  // Lets the others go, once all plans have returned.
  void close();

 private:
  void fill_in(BatchPlan& plan);
  void note_samples(const StepResult& result);
  std::optional<Acknowledgement> gather(TimePoint until);

  Runtime& runtime_;
  const GroupLinks links_;
  std::optional<StepResult> own_;  // which the others have not all acknowledged
  Acknowledgements acknowledgements_;
  double waited_ = 0;  // seconds, for those of the plan that own_ is of
  std::mutex mutex_;
  std::deque<std::vector<int32_t>> sampling_;          // slots that sample in each plan in flight
  std::unordered_map<int32_t, int32_t> last_sampled_;  // by slot
};

// Runs what rank 0 says until it closes. Throws a GroupError when the group has failed.
void follow(Runtime& runtime, const GroupLinks& links);

}  // namespace fastserve
