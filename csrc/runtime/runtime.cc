#include "runtime/runtime.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "common/check.h"

namespace fastserve {

namespace {
// The spec is checked before anything is sized by it.
const ModelSpec& validated(const ModelSpec& spec, const Shard& shard) {
  spec.validate();
  shard.validate(spec);
  return spec;
}
}  // namespace

KvLayout Runtime::kv_layout(const ModelSpec& spec, KvFormat format, int64_t block_size) {
  return {format, spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size};
}

Runtime::Runtime(const ModelSpec& spec, const Shard& shard, const RuntimeOptions& options, const Neighbours& neighbours)
    : spec_(validated(spec, shard)),
      shard_(shard),
      options_(options),
      neighbours_(neighbours),
      backend_(make_cpu_backend(options.threads)),
      weights_(spec_, shard, options.dtype, options.formats, *backend_),
      pool_(kv_layout(spec_, options.kv_format, options.block_size), options.num_blocks, options.num_host_blocks),
      copies_(pool_, options.swap_bandwidth),
      transformer_(spec_, shard, weights_, *backend_, options.max_tokens, neighbours,
                   [this](const std::exception_ptr& error) { fail(error); }) {
  if (neighbours.tensor != nullptr && shard.last_stage) {
    shared_sampling_.emplace(*neighbours.tensor, shard, spec_.vocab_size);
  }
  backend_->set_kv_pool(pool_.layout(), pool_.block(Tier::kDevice, 0));
  worker_ = std::thread([this] { work(); });
}

Runtime::~Runtime() {
  bool unfinished;
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    unfinished = executing_ || !plans_.empty();
  }
  submitted_.notify_all();
  if (unfinished || !transformer_.flushed()) {
    fail(std::make_exception_ptr(
        Error("ends before the plans it was given")));  // or wait for neighbours, and they for it
  }
  copies_.stop();  // the worker may be waiting for one
  worker_.join();
}

void Runtime::load_tensor(const std::string& name, SourceType type, const std::vector<int64_t>& shape,
                          int64_t first_row, const void* data, int64_t bytes) {
  FS_CHECK(!loaded_, "tensor '", name, "' comes after loading was finished");
  weights_.load(name, type, shape, first_row, data, bytes);
}

void Runtime::finish_loading() {
  weights_.check_complete();
  loaded_ = true;
}

void Runtime::check(const BatchPlan& plan) {
  FS_CHECK(loaded_, "a plan was submitted before the weights were loaded");
  {
    std::lock_guard lock(mutex_);
    if (failure_) throw GroupError(*failure_);
  }
  copies_.check(plan.copies);
}

void Runtime::submit(BatchPlan plan) {
  check(plan);
  copies_.submit(plan.copies);
  {
    std::lock_guard lock(mutex_);
    plans_.push_back(std::move(plan));
  }
  submitted_.notify_one();
}

std::optional<StepResult> Runtime::poll(double seconds) {
  std::unique_lock lock(mutex_);
  const auto ready = [&] { return failure_ || !results_.empty(); };
  if (seconds < 0) {
    finished_.wait(lock, ready);
  } else if (!finished_.wait_for(lock, std::chrono::duration<double>(seconds), ready)) {
    return std::nullopt;
  }
  StepResult result;
  if (results_.empty()) {
    result.error = std::make_exception_ptr(GroupError(*failure_));
  } else {
    result = std::move(results_.front());
    results_.pop_front();
  }
  return result;
}

const Communicator* Runtime::any_neighbour() const {
  for (const Communicator* each : {neighbours_.tensor, neighbours_.receives, neighbours_.sends}) {
    if (each != nullptr) return each;
  }
  return nullptr;
}

std::string Runtime::abort(const std::string& reason) {
  {
    std::lock_guard lock(mutex_);
    if (failure_) return *failure_;
    failure_ = reason;
  }
  submitted_.notify_all();
  finished_.notify_all();
  for (Communicator* each : {neighbours_.tensor, neighbours_.receives, neighbours_.sends}) {
    if (each != nullptr) each->abort(reason);
  }
  return reason;
}

// Alone, a rank fails one plan at a time.
void Runtime::fail(const std::exception_ptr& error) {
  const Communicator* neighbour = any_neighbour();
  if (neighbour != nullptr) abort(line_of(error, neighbour->members()[neighbour->rank()]));
}

std::span<const std::byte> Runtime::block(Tier tier, int64_t index) const {
  FS_CHECK(index >= 0 && index < pool_.num_blocks(tier), "block ", index, " is outside the pool of ",
           pool_.num_blocks(tier));
  return {pool_.block(tier, index), static_cast<size_t>(pool_.layout().block_bytes())};
}

void Runtime::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    submitted_.wait(lock, [&] { return stop_ || failure_ || !plans_.empty(); });
    if (stop_ || failure_) return;
    const BatchPlan plan = std::move(plans_.front());
    plans_.pop_front();
    executing_ = true;
    lock.unlock();
    StepResult result;
    try {
      result = execute(plan);
    } catch (...) {
      result.error = std::current_exception();
    }
    if (result.error) fail(result.error);
    result.plan_id = plan.plan_id;
    lock.lock();
    executing_ = false;
    if (result.error && failure_) return;  // which poll() returns from now on
    results_.push_back(std::move(result));
    finished_.notify_one();
  }
}

StepResult Runtime::execute(const BatchPlan& plan) {
  const auto begin = std::chrono::steady_clock::now();
  validate(plan, slots_,
           {spec_.vocab_size, spec_.max_position, options_.max_tokens, options_.block_size, options_.num_blocks});
  apply_deltas(plan);

  StepResult result;
  if (!plan.rows.empty()) {
    rows_.clear();
    token_ids_.clear();
    positions_.clear();
    logit_tokens_.clear();
    for (const PlanRow& row : plan.rows) {
      const Slot& slot = slots_.at(row.slot);
      const auto first = static_cast<int64_t>(token_ids_.size());
      rows_.push_back({first, row.tokens, row.start, slot.table.data()});
      for (int32_t i = 0; i < row.tokens; ++i) {
        const int32_t token = plan.tokens[first + i];
        token_ids_.push_back(token == -1 ? slot.last_sampled : token);
        positions_.push_back(row.start + i + static_cast<int32_t>(spec_.position_offset));
        if (i >= row.tokens - row.logits) logit_tokens_.push_back(static_cast<int32_t>(first + i));
      }
    }
    float* logits = transformer_.forward(rows_, token_ids_, positions_, logit_tokens_);
    for (const PlanRow& row : plan.rows) slots_.at(row.slot).computed = int64_t{row.start} + row.tokens;
    if (logits != nullptr) {
      if (plan.return_logits) result.logits = all_logits(logits, static_cast<int64_t>(logit_tokens_.size()));
      sample_rows(plan, logits, result);
      note_samples(plan, result);
    }
  }
  result.copies = copies_.take(plan.rows.empty());
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

void Runtime::apply_deltas(const BatchPlan& plan) {
  for (const int32_t slot : plan.closed) slots_.erase(slot);
  for (const OpenedSlot& opened : plan.opened) {
    Slot& slot = slots_[opened.slot];
    slot.prompt_length = opened.prompt_length;
    slot.params = opened.params;
    for (size_t i = 0; i < opened.history.size(); ++i) {
      if (static_cast<int64_t>(i) < opened.prompt_length) {
        slot.counts.add_prompt(opened.history[i]);
      } else {
        slot.counts.add_output(opened.history[i]);
      }
    }
  }
  for (const TableEntry& entry : plan.table) {
    auto& table = slots_.at(entry.slot).table;
    if (entry.index == static_cast<int64_t>(table.size())) {
      table.push_back(entry.block);
    } else {
      table[entry.index] = entry.block;
    }
  }
}

std::vector<float> Runtime::all_logits(const float* logits, int64_t count) {
  if (shared_sampling_) return shared_sampling_->gather_logits(logits, transformer_.ld_logits(), count);
  std::vector<float> all;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = logits + i * transformer_.ld_logits();
    all.insert(all.end(), row, row + spec_.vocab_size);
  }
  return all;
}

void Runtime::sample_rows(const BatchPlan& plan, float* logits, StepResult& result) {
  struct Work {
    const PlanRow* row;
    const Slot* slot;
    float* logits;
    size_t sample;  // of the batch
  };
  std::vector<Work> work;
  std::vector<int64_t> sampled_rows;
  int64_t last_logits = -1;
  for (const PlanRow& row : plan.rows) {
    if (row.logits == 0) continue;
    last_logits += row.logits;
    const size_t sample = sampled_rows.size();
    sampled_rows.push_back(last_logits);
    if (shared_sampling_ && !shared_sampling_->mine(static_cast<int64_t>(sample))) continue;
    work.push_back({&row, &slots_.at(row.slot), logits + last_logits * transformer_.ld_logits(), sample});
  }
  if (shared_sampling_) {
    float* whole = shared_sampling_->exchange(logits, transformer_.ld_logits(), sampled_rows);
    for (Work& each : work) {
      each.logits = whole;
      whole += shared_sampling_->ld_rows();
    }
  }
  result.sampled.resize(sampled_rows.size());
  auto body = [&](int64_t i) {
    const auto& [row, slot, row_logits, sample] = work[i];
    const int64_t output_index = int64_t{row->start} + row->tokens - slot->prompt_length;
    try {
      result.sampled[sample] =
          fastserve::sample(backend_->logit_kernels(), {row_logits, static_cast<size_t>(spec_.vocab_size)},
                            slot->params, slot->counts, output_index);
    } catch (const std::exception& error) {
      result.sampled[sample] = {.token = -1, .logprob = std::nanf(""), .top = {}, .error = error.what()};
    }
  };
  backend_->parallel_for(
      static_cast<int64_t>(work.size()),
      [](void* context, int64_t i, int) { (*static_cast<decltype(body)*>(context))(i); }, &body);
  if (shared_sampling_) shared_sampling_->gather(result.sampled);
}

void Runtime::note_samples(const BatchPlan& plan, const StepResult& result) {
  size_t sample = 0;
  for (const PlanRow& row : plan.rows) {
    if (row.logits == 0) continue;
    // A plan queued behind this one may already refer to a token that could not be sampled. Any will do then, since
    // the job ends here.
    Slot& slot = slots_.at(row.slot);
    slot.last_sampled = std::max(0, result.sampled[sample++].token);
    if (slot.params.needs_history()) slot.counts.add_output(slot.last_sampled);
  }
}

}  // namespace fastserve
