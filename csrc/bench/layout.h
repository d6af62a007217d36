// A model over processes of this host, shared out and linked as fastserve/sharding.py and fastserve/links.py do it.
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/random_model.h"
#include "comm/communicator.h"
#include "comm/segment.h"
#include "runtime/group.h"

namespace fastserve::bench {

// tensor × pipeline ranks, numbered by stage and then by part of a stage.
struct Layout {
  int tensor, pipeline;
  int ranks() const { return tensor * pipeline; }
};

// What one rank holds.
struct Part {
  ModelSpec spec;
  Shard shard;
};
// Throws UsageError where a rank would hold nothing.
Part part_of(const Candidate& model, const Layout& layout, int rank);

// A rank's ways to the others; all ranks make theirs together.
class Links {
 public:
  Links(Communicator& world, const Layout& layout);
  Neighbours neighbours() const;
  GroupLinks group() const { return {world_, *answers_, sampler_}; }
  void close();

 private:
  Communicator& world_;
  const int stage_, stages_, sampler_;
  std::unique_ptr<Communicator> answers_, tensor_, ways_[2];
};

// A group of processes, of which this one is rank 0.
class Processes {
 public:
  // Forks, so this process must have no other threads yet. The others wait for rank 0.
  Processes(const Candidate& model, const Layout& layout, const RuntimeSize& size);
  // Without close() before, the others are told that rank 0 is gone.
  ~Processes();
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  // First this, of all groups that there will be: no process may begin after it. Then every rank makes its part.
  void connect();
  void load();
  void submit(BatchPlan plan) { leader_->submit(std::move(plan)); }
  std::optional<StepResult> poll(double seconds) { return leader_->poll(seconds); }
  // Ends the group, once all plans have returned. Throws when a process did not end well.
  void close();

 private:
  std::unique_ptr<Communicator> join(int rank) const;
  void follow(int rank);
  bool wait_for_others();

  const Candidate& model_;
  const Layout layout_;
  const RuntimeSize size_;
  std::unique_ptr<SegmentFile> memory_;
  std::vector<pid_t> others_;
  std::unique_ptr<Communicator> world_;
  std::optional<Links> links_;
  std::unique_ptr<Runtime> runtime_;
  std::optional<Leader> leader_;
};

}  // namespace fastserve::bench
