#include "runtime/runtime.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "backend/cpu/host_sampler.h"
#include "backend/device.h"
#include "common/check.h"

namespace fastserve {

namespace {
// Plans often come in, or are done, one right after the other.
constexpr auto kSpinTime = std::chrono::microseconds(50);

// The spec is checked before anything is sized by it.
const ModelSpec& validated(const ModelSpec& spec, const Shard& shard) {
  spec.validate();
  shard.validate(spec);
  return spec;
}
}  // namespace

KvShape Runtime::kv_shape(const ModelSpec& spec, KvFormat format, int64_t block_size) {
  return {format, spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size};
}

Runtime::Runtime(const ModelSpec& spec, const Shard& shard, const RuntimeOptions& options, const Neighbours& neighbours)
    : spec_(validated(spec, shard)),
      shard_(shard),
      options_(options),
      neighbours_(neighbours),
      backend_(make_backend(options.device, options.dtype, options.threads)),
      weights_(spec_, shard, options.dtype, options.formats, *backend_),
      transformer_(spec_, shard, weights_, *backend_, options.max_tokens, neighbours,
                   [this](const std::exception_ptr& error) { fail(error); }) {
  make_pools();
  if (shard.last_stage && neighbours.tensor == nullptr) {
    sampler_ = backend_->make_sampler(spec_.vocab_size);
  } else if (shard.last_stage) {
    shared_sampling_.emplace(*neighbours.tensor, shard, spec_.vocab_size);
    sampler_threads_ = std::make_unique<ThreadPool>(backend_->threads());
    sampler_ = make_host_sampler(*sampler_threads_, spec_.vocab_size);
  }
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
  copies_->stop();  // the worker may be waiting for one
  worker_.join();
  backend_->drain();
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

void Runtime::make_pools() {
  copies_.reset();
  pool_.reset();
  pool_.emplace(*backend_, kv_shape(spec_, options_.kv_format, options_.block_size), options_.num_blocks,
                options_.num_host_blocks);
  copies_.emplace(*pool_, options_.swap_bandwidth);
}

void Runtime::check_idle(const char* what) {
  std::lock_guard lock(mutex_);
  if (failure_) throw GroupError(*failure_);
  FS_CHECK(loaded_ && !executing_ && plans_.empty(), what, " is for a loaded model while nothing runs");
}

int64_t Runtime::free_bytes(int64_t rows, int64_t positions) {
  check_idle("free_bytes");
  if (backend_->on_host()) return -1;
  backend_->enter_thread();
  if (sampler_) sampler_->reserve(rows);
  const int64_t tokens = std::min({options_.max_tokens, options_.num_blocks * options_.block_size, spec_.max_position});
  std::vector<int32_t> table(ceil_div(tokens, options_.block_size)), ids(tokens), places(tokens), wanted;
  std::iota(table.begin(), table.end(), 0);
  for (int64_t i = 0; i < tokens; ++i) {
    places[i] = static_cast<int32_t>(i + spec_.position_offset);
    if (i >= tokens - backend_->filled_up(rows)) wanted.push_back(static_cast<int32_t>(i));
  }
  const Row row{0, tokens, 0, table.data()};
  transformer_.forward({{&row, 1}, ids, places, wanted});
  backend_->end();
  backend_->wait();
  backend_->reserve(rows, positions);
  return backend_->free_bytes();
}

void Runtime::set_pools(int64_t num_blocks, int64_t num_host_blocks) {
  check_idle("set_pools");
  FS_CHECK(num_blocks > 0 && num_host_blocks >= 0, "pools of ", num_blocks, " and ", num_host_blocks, " blocks");
  options_.num_blocks = num_blocks;
  options_.num_host_blocks = num_host_blocks;
  slots_.clear();
  make_pools();
}

void Runtime::check(const BatchPlan& plan) {
  FS_CHECK(loaded_, "a plan was submitted before the weights were loaded");
  {
    std::lock_guard lock(mutex_);
    if (failure_) throw GroupError(*failure_);
  }
  copies_->check(plan.copies);
}

void Runtime::submit(BatchPlan plan) {
  check(plan);
  copies_->submit(plan.copies);
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

std::vector<std::byte> Runtime::block(Tier tier, int64_t index) const {
  FS_CHECK(index >= 0 && index < pool_->num_blocks(tier), "block ", index, " is outside the pool of ",
           pool_->num_blocks(tier));
  std::vector<std::byte> bytes(pool_->block_bytes());
  if (tier == Tier::kDevice) {
    backend_->download(pool_->block(tier, index), bytes.data(), pool_->block_bytes());
  } else {
    std::memcpy(bytes.data(), pool_->block(tier, index), bytes.size());
  }
  return bytes;
}

// Launches a plan before the one before it is finished where the backend can have both.
void Runtime::work() {
  backend_->enter_thread();
  std::deque<Launched> launched;
  bool watched = false;  // the oldest
  const auto room = [&] {
    return static_cast<int64_t>(launched.size()) < (any_neighbour() == nullptr ? backend_->depth() : 1);
  };
  const auto runs = [](const Launched& each) { return !each.result.error && !each.plan.rows.empty(); };
  std::unique_lock lock(mutex_);
  // A plan that comes while the oldest runs is launched behind it: were it launched afterwards, the device would be
  // idle meanwhile. Whether the oldest is over, and not something else to be done first.
  const auto await_oldest = [&] {
    const auto called = [&] { return stop_ || failure_ || !plans_.empty(); };
    const auto spin_until = std::chrono::steady_clock::now() + kSpinTime;
    while (!watched && !called()) {
      lock.unlock();
      bool over = true;
      try {
        over = backend_->done();
      } catch (...) {
        launched.front().result.error = std::current_exception();
      }
      if (!over && std::chrono::steady_clock::now() >= spin_until) {
        watched = true;
        backend_->when_done([this] {
          std::lock_guard told(mutex_);
          oldest_over_ = true;
          submitted_.notify_all();
        });
      }
      lock.lock();
      if (over) return true;
    }
    submitted_.wait(lock, [&] { return oldest_over_ || called(); });
    return oldest_over_;
  };
  for (;;) {
    submitted_.wait(lock, [&] { return stop_ || failure_ || !plans_.empty() || !launched.empty(); });
    if (stop_ || failure_) return;
    executing_ = true;
    if (!plans_.empty() && room()) {
      BatchPlan plan = std::move(plans_.front());
      plans_.pop_front();
      lock.unlock();
      launched.push_back(launch(std::move(plan)));
      lock.lock();
      if (!launched.back().result.error && room() && !plans_.empty()) continue;
    }
    if (room() && runs(launched.front()) && !await_oldest()) continue;
    Launched oldest = std::move(launched.front());
    launched.pop_front();
    lock.unlock();
    StepResult result = finish(std::move(oldest));
    if (result.error) fail(result.error);
    lock.lock();
    watched = oldest_over_ = false;
    executing_ = !launched.empty();
    if (result.error && failure_) return;  // which poll() returns from now on
    results_.push_back(std::move(result));
    finished_.notify_one();
  }
}

Runtime::Launched Runtime::launch(BatchPlan plan) {
  Launched launched;
  launched.begin = std::chrono::steady_clock::now();
  launched.plan = std::move(plan);
  try {
    validate(launched.plan, slots_,
             {spec_.vocab_size, spec_.max_position, options_.max_tokens, options_.block_size, options_.num_blocks});
    apply_deltas(launched.plan);
    if (launched.plan.rows.empty()) return launched;
    float* logits = transformer_.forward(batch_of(launched.plan));
    for (const PlanRow& row : launched.plan.rows) slots_.at(row.slot).computed = int64_t{row.start} + row.tokens;
    if (logits != nullptr) sample_rows(launched, logits);
    backend_->end();
  } catch (...) {
    launched.result.error = std::current_exception();
    if (launched.sampling) sampler_->drop_latest();
    give_up_samples(launched);
  }
  return launched;
}

StepResult Runtime::finish(Launched launched) {
  StepResult& result = launched.result;
  result.plan_id = launched.plan.plan_id;
  if (result.error) return std::move(result);
  try {
    if (!launched.plan.rows.empty()) wait_for(launched);
    if (launched.sampling) result.sampled = take_samples(launched);
    result.copies = copies_->take(launched.plan.rows.empty());
  } catch (...) {
    result.error = std::current_exception();
  }
  const auto end = std::chrono::steady_clock::now();
  result.seconds = std::chrono::duration<double>(end - std::max(launched.begin, last_end_)).count();
  last_end_ = end;
  return std::move(result);
}

void Runtime::wait_for(Launched& oldest) {
  try {
    backend_->wait();
  } catch (...) {
    if (oldest.sampling) sampler_->drop_oldest();
    give_up_samples(oldest);
    throw;
  }
}

Batch Runtime::batch_of(const BatchPlan& plan) {
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
      const bool to_come = token == -1 && slot.sampling > 0;
      token_ids_.push_back(to_come ? sampler_->last_of(row.slot) : token == -1 ? slot.last_sampled : token);
      positions_.push_back(row.start + i + static_cast<int32_t>(spec_.position_offset));
      if (i >= row.tokens - row.logits) logit_tokens_.push_back(static_cast<int32_t>(first + i));
    }
  }
  return {rows_, token_ids_, positions_, logit_tokens_};
}

void Runtime::apply_deltas(const BatchPlan& plan) {
  for (const int32_t slot : plan.closed) {
    slots_.erase(slot);
    if (sampler_) sampler_->close(slot);
  }
  for (const OpenedSlot& opened : plan.opened) {
    Slot& slot = slots_[opened.slot];
    slot.job = ++jobs_;
    slot.prompt_length = opened.prompt_length;
    if (!sampler_) continue;
    const std::span<const int32_t> history = opened.history;
    const size_t prompt = std::min<size_t>(history.size(), opened.prompt_length);
    sampler_->open(opened.slot, opened.params, history.first(prompt), history.subspan(prompt));
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
  std::vector<float> all(count * spec_.vocab_size);
  for (int64_t i = 0; i < count; ++i) {
    backend_->download(logits + i * transformer_.ld_logits(), all.data() + i * spec_.vocab_size,
                       spec_.vocab_size * static_cast<int64_t>(sizeof(float)));
  }
  return all;
}

void Runtime::sample_rows(Launched& launched, float* logits) {
  const auto count = static_cast<int64_t>(logit_tokens_.size());
  if (shared_sampling_ && !backend_->on_host()) {  // ranks exchange them on the host
    const int64_t bytes = count * transformer_.ld_logits() * static_cast<int64_t>(sizeof(float));
    if (static_cast<int64_t>(host_logits_.bytes()) < bytes) host_logits_ = backend_->allocate_host(bytes);
    backend_->download(logits, host_logits_.as<float>(), bytes);
    logits = host_logits_.as<float>();
  }
  if (launched.plan.return_logits) launched.result.logits = all_logits(logits, count);

  std::vector<SampleRequest> requests;
  std::vector<int64_t> sampled_rows;
  int64_t last_logits = -1;
  for (const PlanRow& row : launched.plan.rows) {
    if (row.logits == 0) continue;
    last_logits += row.logits;
    Slot& slot = slots_.at(row.slot);
    ++slot.sampling;
    launched.sampled.emplace_back(row.slot, slot.job);
    const auto sample = static_cast<int64_t>(sampled_rows.size());
    sampled_rows.push_back(last_logits);
    const int64_t output_index = int64_t{row.start} + row.tokens - slot.prompt_length;
    if (!shared_sampling_) {
      requests.push_back({last_logits, row.slot, output_index});
    } else if (shared_sampling_->mine(sample)) {
      requests.push_back({static_cast<int64_t>(requests.size()), row.slot, output_index});
    }
  }
  if (shared_sampling_) {
    logits = shared_sampling_->exchange(logits, transformer_.ld_logits(), sampled_rows);
    sampler_->sample(logits, shared_sampling_->ld_rows(), requests);
  } else {
    sampler_->sample(logits, transformer_.ld_logits(), requests);
  }
  launched.sampling = true;
}

// Slots whose samples will not come have no token to come either.
void Runtime::give_up_samples(Launched& launched) {
  launched.sampling = false;
  for (const auto& [slot, job] : launched.sampled) {
    const auto found = slots_.find(slot);
    if (found != slots_.end() && found->second.job == job) --found->second.sampling;
  }
}

std::vector<Sampled> Runtime::take_samples(const Launched& launched) {
  std::vector<Sampled> own = sampler_->take(), all;
  if (shared_sampling_) {
    all.resize(launched.sampled.size());
    for (size_t i = 0, next = 0; i < all.size(); ++i) {
      if (shared_sampling_->mine(static_cast<int64_t>(i))) all[i] = std::move(own[next++]);
    }
    shared_sampling_->gather(all);
  } else {
    all = std::move(own);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [slot, job] = launched.sampled[i];
    const auto found = slots_.find(slot);
    if (found == slots_.end() || found->second.job != job) continue;  // a plan launched meanwhile has closed it
    // A plan queued behind this one may already refer to a token that could not be sampled. Any will do then, since
    // the job ends here.
    found->second.last_sampled = std::max(0, all[i].token);
    --found->second.sampling;
    if (shared_sampling_ && !shared_sampling_->mine(static_cast<int64_t>(i))) sampler_->note(slot, all[i].token);
  }
  return all;
}

}  // namespace fastserve
