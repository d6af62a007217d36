#include "runtime/runtime.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

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
                   [this](const std::exception_ptr& error) { fail(error); }),
      runner_(spec_, shard, neighbours.tensor, *backend_, transformer_) {
  make_pools();
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
  runner_.reserve(rows);
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
  runner_.forget();
  make_pools();
}

PlanLimits Runtime::limits() const {
  return {spec_.vocab_size, spec_.max_position, options_.max_tokens, options_.block_size, options_.num_blocks};
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
  std::deque<LaunchedPlan> launched;
  bool watched = false;  // the oldest
  const auto room = [&] {
    return static_cast<int64_t>(launched.size()) < (any_neighbour() == nullptr ? backend_->depth() : 1);
  };
  const auto runs = [](const LaunchedPlan& each) { return !each.result.error && !each.plan.rows.empty(); };
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
      launched.push_back(runner_.launch(std::move(plan), limits()));
      lock.lock();
      if (!launched.back().result.error && room() && !plans_.empty()) continue;
    }
    if (room() && runs(launched.front()) && !await_oldest()) continue;
    LaunchedPlan oldest = std::move(launched.front());
    launched.pop_front();
    lock.unlock();
    StepResult result = runner_.finish(std::move(oldest), *copies_);
    if (result.error) fail(result.error);
    lock.lock();
    watched = oldest_over_ = false;
    executing_ = !launched.empty();
    if (result.error && failure_) return;  // which poll() returns from now on
    results_.push_back(std::move(result));
    finished_.notify_one();
  }
}

}  // namespace fastserve
