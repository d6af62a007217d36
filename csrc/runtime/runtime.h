// Executes plans in submission order on a thread of its own, and their copies on two more.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "model/shard.h"
#include "model/spec.h"
#include "model/transformer.h"
#include "model/weights.h"
#include "runtime/copy_engine.h"
#include "runtime/kv_pool.h"
#include "runtime/plan.h"
#include "runtime/plan_runner.h"

namespace fastserve {

struct RuntimeOptions {
  std::string device;  // cpu or cuda
  DType dtype;
  KvFormat kv_format;
  int64_t block_size;
  int64_t num_blocks;
  int64_t max_tokens;  // of one plan
  int threads;         // 0: one a core
  int64_t num_host_blocks = 0;
  int64_t swap_bandwidth = 0;  // bytes a second, each direction; 0: as it comes
  WeightFormats formats = {};  // see Weights
};

class Runtime {
 public:
  // `spec` is the shape of what `shard` is. The ranks that hold the rest, if any, run the same plans in the same order.
  // Tokens are sampled in the last stage, so only there, on all its ranks, results hold them. Throws a GroupError when
  // a neighbour is gone, and plain Errors for what is wrong here.
  Runtime(const ModelSpec& spec, const Shard& shard, const RuntimeOptions& options, const Neighbours& neighbours = {});
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // Loading: every tensor once, as Weights::load takes it, then finish_loading(), which throws while some are missing.
  // Not while plans run.
  void load_tensor(const std::string& name, SourceType type, const std::vector<int64_t>& shape, int64_t first_row,
                   const void* data, int64_t bytes);
  void finish_loading();
  // Bytes of the device's memory that nobody has, once the largest iteration has run, and there is what all others of
  // up to `rows` rows, with contexts of so many positions, need; -1 where its memory is the host's. Nor while plans
  // run. All ranks take part.
  int64_t free_bytes(int64_t rows, int64_t positions);
  // Other pools, which are empty. Nor while plans or copies run.
  void set_pools(int64_t num_blocks, int64_t num_host_blocks);

  // Queues a plan and starts its copies. Throws, doing neither, when loading is not finished, the runtime has failed or
  // a copy is illegal (see CopyEngine::submit): copies run before the plan's turn to be checked comes.
  void submit(BatchPlan plan);
  // Throws where submit() would. What has passed here passes there, unless the runtime fails meanwhile.
  void check(const BatchPlan& plan);
  // The oldest result not yet returned; waits up to `seconds` (negative: as long as it takes) and returns nothing then.
  // A plan without rows ends with the next copy to finish, or at once when none is under way.
  //
  // A failed plan's result carries the error and nothing else. Without neighbours, one that did not pass validation has
  // changed nothing, though its copies are made, and others may follow. With neighbours, who cannot go on without this
  // rank, any failure is the runtime's last: they are told, and all further results are this error.
  std::optional<StepResult> poll(double seconds);
  // Fails with a GroupError that says this, unless it has failed already: ends what waits, here and, where they wait
  // for this rank, at its neighbours'. Returns what it has failed with. From any thread.
  std::string abort(const std::string& reason);
  // Waits until the next stage has all it was to get from the plans whose results are there. Throws when it cannot.
  void flush() { transformer_.flush(); }

  const char* instruction_set() const { return backend_->name(); }  // or the device
  int threads() const { return backend_->threads(); }
  int64_t weight_bytes() const { return weights_.bytes(); }
  // The bytes of one block, for tests; nothing may be writing it.
  std::vector<std::byte> block(Tier tier, int64_t index) const;
  static KvShape kv_shape(const ModelSpec& spec, KvFormat format, int64_t block_size);

 private:
  void work();
  const Communicator* any_neighbour() const;
  void fail(const std::exception_ptr& error);
  void make_pools();
  void check_idle(const char* what);
  PlanLimits limits() const;

  const ModelSpec spec_;
  const Shard shard_;
  RuntimeOptions options_;
  const Neighbours neighbours_;

  std::mutex mutex_;
  std::condition_variable submitted_, finished_;
  std::deque<BatchPlan> plans_;
  std::deque<StepResult> results_;
  std::optional<std::string> failure_;  // the runtime's own, and its last
  bool executing_ = false;
  bool oldest_over_ = false;  // of the plans that are launched, where the worker has asked to be told
  bool stop_ = false;

  std::unique_ptr<Backend> backend_;
  Weights weights_;
  std::optional<KvPool> pool_;
  std::optional<CopyEngine> copies_;
  Transformer transformer_;  // has a thread that calls fail()
  PlanRunner runner_;        // the worker's
  bool loaded_ = false;

  std::thread worker_;
};

}  // namespace fastserve
