#include "bench/decode_beside_copies.h"

#include <algorithm>
#include <chrono>

#include "backend/device.h"

namespace fastserve::bench {

namespace {
constexpr int32_t kGroups = 8;  // copies of a direction that are under way at a time
constexpr int64_t kWarm = 3;    // iterations before the first that counts
}  // namespace

DecodeBesideCopies::DecodeBesideCopies(const Candidate& model, const Shape& shape, const Options& options)
    : shape_(shape) {
  const int64_t per_job = ceil_div(shape.context + shape.steps + kWarm, shape.block_size);
  first_block_ = shape.jobs * per_job;
  block_bytes_ = block_bytes(options.device(), Runtime::kv_shape(model.spec, model.kv, shape.block_size));
  blocks_per_copy_ = std::max<int64_t>(1, shape.bytes / kGroups / block_bytes_);
  const int64_t copied = 2 * kGroups * blocks_per_copy_;
  runtime_ = random_model(model, {.block_size = shape.block_size,
                                  .num_blocks = first_block_ + copied,
                                  .max_tokens = std::max(kPromptTokens, shape.jobs),
                                  .threads = options.threads(),
                                  .device = options.device(),
                                  .num_host_blocks = copied});
  run_plans(*runtime_, prompt_plans(model.spec, shape.jobs, shape.context, per_job));
}

BatchPlan DecodeBesideCopies::plan(int64_t step) const {
  BatchPlan made;
  for (int64_t job = 0; job < shape_.jobs; ++job) {
    made.rows.push_back({static_cast<int32_t>(job), static_cast<int32_t>(shape_.context + step), 1, 1});
    made.tokens.push_back(-1);
  }
  return made;
}

void DecodeBesideCopies::add_copy(BatchPlan& plan, const Group& group) {
  const auto [direction, number] = group;
  const int64_t first = (direction * kGroups + number) * blocks_per_copy_;
  for (int64_t i = 0; i < blocks_per_copy_; ++i) {
    const auto host = static_cast<int32_t>(first + i), device = static_cast<int32_t>(first_block_ + first + i);
    plan.copies.push_back(
        {next_copy_, direction, direction == kOffload ? device : host, direction == kOffload ? host : device});
  }
  under_way_.emplace_back(next_copy_++, group);
}

std::vector<DecodeBesideCopies::Group> DecodeBesideCopies::finished(const StepResult& result) {
  std::vector<Group> groups;
  for (const FinishedCopy& copy : result.copies) {
    const auto found = std::ranges::find(under_way_, copy.copy, &std::pair<int32_t, Group>::first);
    groups.push_back(found->second);
    under_way_.erase(found);
  }
  return groups;
}

DecodeBesideCopies::Sample DecodeBesideCopies::run(bool with_copies) {
  using Clock = std::chrono::steady_clock;
  const int64_t steps = kWarm + shape_.steps;
  std::vector<Group> idle;
  for (int32_t number = 0; with_copies && number < kGroups; ++number) {
    idle.insert(idle.end(), {{kOffload, number}, {kUpload, number}});
  }
  int64_t submitted = 0;
  const auto submit = [&] {
    BatchPlan next = plan(submitted++);
    for (const Group& group : idle) add_copy(next, group);
    idle.clear();
    runtime_->submit(std::move(next));
  };
  submit();
  Clock::time_point begin;
  int64_t copies[2] = {0, 0};
  for (int64_t step = 0; step < steps; ++step) {
    if (submitted < steps) submit();
    const StepResult result = *runtime_->poll(-1);
    check_result(result);
    if (step + 1 == kWarm) begin = Clock::now();
    for (const Group& group : finished(result)) {
      copies[group.first] += step >= kWarm ? 1 : 0;
      idle.push_back(group);
    }
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  while (!under_way_.empty()) {
    runtime_->submit({});
    const StepResult result = *runtime_->poll(-1);
    check_result(result);
    finished(result);
  }
  const auto rate = [&](int32_t direction) {
    return static_cast<double>(copies[direction] * blocks_per_copy_ * block_bytes_) / seconds;
  };
  return {seconds / static_cast<double>(shape_.steps), rate(kOffload), rate(kUpload)};
}

}  // namespace fastserve::bench
