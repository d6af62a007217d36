// Iterations of decodes while KV blocks go both ways beside them, as fast as they can, and while none do.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "bench/random_model.h"

namespace fastserve::bench {

class DecodeBesideCopies {
 public:
  struct Shape {
    int64_t jobs, context, steps;
    int64_t bytes;  // of copies that are under way at a time, each direction
    int64_t block_size;
  };
  struct Sample {
    double seconds;                     // of an iteration
    double to_host = 0, to_device = 0;  // bytes a second meanwhile
  };

  DecodeBesideCopies(const Candidate& model, const Shape& shape, const Options& options);

  Sample alone() { return run(false); }
  Sample beside() { return run(true); }

 private:
  using Group = std::pair<int32_t, int32_t>;  // direction and number of a copy

  Sample run(bool with_copies);
  BatchPlan plan(int64_t step) const;
  void add_copy(BatchPlan& plan, const Group& group);
  std::vector<Group> finished(const StepResult& result);

  const Shape shape_;
  int64_t first_block_, blocks_per_copy_, block_bytes_;
  std::unique_ptr<Runtime> runtime_;
  int32_t next_copy_ = 0;
  std::vector<std::pair<int32_t, Group>> under_way_;
};

}  // namespace fastserve::bench
