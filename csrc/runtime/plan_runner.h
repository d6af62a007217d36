// What a plan asks for, done: slots brought up to date, its rows run, tokens sampled. One thread calls.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "common/thread_pool.h"
#include "model/shard.h"
#include "model/spec.h"
#include "model/token_sampler.h"
#include "model/transformer.h"
#include "runtime/copy_engine.h"
#include "runtime/plan.h"
#include "runtime/shared_sampling.h"

namespace fastserve {

// A plan whose operations are queued.
struct LaunchedPlan {
  BatchPlan plan;
  StepResult result;
  std::chrono::steady_clock::time_point begin;
  std::vector<std::pair<int32_t, int64_t>> sampled;  // slots of the rows with logits, and which job they held
  bool sampling = false;                             // the sampler is at it
};

class PlanRunner {
 public:
  // `stage`: the ranks that share the logits; null: this one has all of them. All that is given outlives this.
  PlanRunner(const ModelSpec& spec, const Shard& shard, Communicator* stage, Backend& backend,
             Transformer& transformer);

  // Memory for samples of so many rows.
  void reserve(int64_t rows);
  // No slot is open from here on.
  void forget() { slots_.clear(); }
  // Queues what the plan asks for. What goes wrong is in the result; a plan that is not valid has changed nothing.
  LaunchedPlan launch(BatchPlan plan, const PlanLimits& limits);
  // Waits for the oldest plan that was launched, and for a copy if the plan has no rows.
  StepResult finish(LaunchedPlan launched, CopyEngine& copies);

 private:
  void wait_for(LaunchedPlan& oldest);
  void give_up_samples(LaunchedPlan& launched);
  void apply_deltas(const BatchPlan& plan);
  Batch batch_of(const BatchPlan& plan);
  std::vector<float> all_logits(const float* logits, int64_t count);
  void sample_rows(LaunchedPlan& launched, float* logits);
  std::vector<Sampled> take_samples(const LaunchedPlan& launched);

  const ModelSpec& spec_;
  Backend& backend_;
  Transformer& transformer_;
  std::unique_ptr<ThreadPool> sampler_threads_;    // where not the backend samples, but the host for it
  std::unique_ptr<TokenSampler> sampler_;          // in the last stage
  std::optional<SharedSampling> shared_sampling_;  // where the stage has other ranks
  std::unordered_map<int32_t, Slot> slots_;
  std::vector<Row> rows_;
  std::vector<int32_t> token_ids_, positions_, logit_tokens_;
  int64_t jobs_ = 0;  // opened so far
  Buffer host_logits_;
  std::chrono::steady_clock::time_point last_end_;
};

}  // namespace fastserve
