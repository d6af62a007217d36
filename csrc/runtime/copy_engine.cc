#include "runtime/copy_engine.h"

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

#include "common/check.h"

namespace fastserve {

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kLongest = 1e9;  // seconds; what the clock can count ends at nine times as many

Tier source_tier(int32_t direction) { return direction == kOffload ? Tier::kDevice : Tier::kHost; }
Tier destination_tier(int32_t direction) { return direction == kOffload ? Tier::kHost : Tier::kDevice; }

int64_t blocks_of(const std::vector<BlockRun>& runs) {
  int64_t blocks = 0;
  for (const BlockRun& run : runs) blocks += run.count;
  return blocks;
}

// The time `bytes` take at `bandwidth` bytes a second, rounded up.
Clock::duration least_time(int64_t bytes, int64_t bandwidth) {
  const double seconds = static_cast<double>(bytes) / static_cast<double>(bandwidth);
  return std::chrono::ceil<Clock::duration>(std::chrono::duration<double>(std::min(seconds, kLongest)));
}

}  // namespace

std::vector<BlockRun> coalesce(std::span<const CopyRow> rows) {
  std::vector<CopyRow> sorted(rows.begin(), rows.end());
  std::ranges::sort(sorted, {}, &CopyRow::source);
  std::vector<BlockRun> runs;
  for (const CopyRow& row : sorted) {
    if (!runs.empty() && row.source == runs.back().source + runs.back().count &&
        row.destination == runs.back().destination + runs.back().count) {
      ++runs.back().count;
    } else {
      runs.push_back({row.source, row.destination, 1});
    }
  }
  return runs;
}

CopyEngine::CopyEngine(const KvPool& pool, int64_t bandwidth) : pool_(pool), bandwidth_(bandwidth) {
  if (pool.num_blocks(Tier::kHost) == 0) return;  // nothing will ever pass the checks
  try {
    for (Stream& stream : streams_) stream.thread = std::thread([this, &stream] { work(stream); });
  } catch (const std::system_error& error) {
    stop();
    if (streams_[0].thread.joinable()) streams_[0].thread.join();
    FS_CHECK(false, "the system grants no thread to copy blocks: ", error.what());
  }
}

CopyEngine::~CopyEngine() {
  stop();
  for (Stream& stream : streams_) {
    if (stream.thread.joinable()) stream.thread.join();
  }
}

void CopyEngine::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  finished_one_.notify_all();
  for (Stream& stream : streams_) stream.wake.notify_all();
}

void CopyEngine::check(std::span<const CopyRow> rows) {
  std::lock_guard lock(mutex_);
  Claims claims;
  checked(rows, claims);
}

void CopyEngine::submit(std::span<const CopyRow> rows) {
  if (rows.empty()) return;
  {
    std::lock_guard lock(mutex_);
    Claims claims;
    std::vector<Copy> copies = checked(rows, claims);
    claims_.ids.merge(claims.ids);
    for (int tier = 0; tier < 2; ++tier) claims_.blocks[tier].merge(claims.blocks[tier]);
    for (Copy& copy : copies) {
      Stream& stream = streams_[copy.direction];
      stream.queue.push_back(std::move(copy));
      if (stream.queue.size() == 1) stream.wake.notify_one();  // else it is awake, or waits for time to pass
    }
  }
}

// The copies that `rows` describe, with what they lay claim to.
std::vector<CopyEngine::Copy> CopyEngine::checked(std::span<const CopyRow> rows, Claims& claims) const {
  const auto claim = [&](int32_t copy, Tier tier, int32_t block) {
    const auto i = static_cast<int>(tier);
    const char* name = tier == Tier::kDevice ? "device" : "host";
    FS_CHECK(block >= 0 && block < pool_.num_blocks(tier), name, " block ", block, " of copy ", copy,
             " is outside the pool of ", pool_.num_blocks(tier));
    FS_CHECK(!claims_.blocks[i].contains(block) && claims.blocks[i].insert(block).second, name, " block ", block,
             " of copy ", copy, " is being copied already");
  };
  std::vector<Copy> copies;
  for (size_t first = 0, end = 0; first < rows.size(); first = end) {
    const auto [id, direction, source, destination] = rows[first];
    FS_CHECK(id >= 0 && !claims_.ids.contains(id) && claims.ids.insert(id).second, "copy ", id,
             " is negative, under way already or in two places of the plan");
    FS_CHECK(direction == kOffload || direction == kUpload, "copy ", id, " has the direction ", direction);
    for (; end < rows.size() && rows[end].copy == id; ++end) {
      FS_CHECK(rows[end].direction == direction, "copy ", id, " has two directions");
      claim(id, source_tier(direction), rows[end].source);
      claim(id, destination_tier(direction), rows[end].destination);
    }
    copies.push_back({id, direction, coalesce(rows.subspan(first, end - first)), 0});
  }
  return copies;
}

std::vector<FinishedCopy> CopyEngine::take(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) finished_one_.wait(lock, [&] { return stop_ || failure_ || !finished_.empty() || claims_.ids.empty(); });
  if (failure_) std::rethrow_exception(failure_);
  std::vector<FinishedCopy> taken;
  for (const Copy& copy : finished_) {
    release(copy);
    taken.push_back({copy.id, copy.seconds});
  }
  finished_.clear();
  return taken;
}

void CopyEngine::release(const Copy& copy) {
  auto& sources = claims_.blocks[static_cast<int>(source_tier(copy.direction))];
  auto& destinations = claims_.blocks[static_cast<int>(destination_tier(copy.direction))];
  for (const BlockRun& run : copy.runs) {
    for (int32_t i = 0; i < run.count; ++i) {
      sources.erase(run.source + i);
      destinations.erase(run.destination + i);
    }
  }
  claims_.ids.erase(copy.id);
}

void CopyEngine::work(Stream& stream) {
  std::unique_lock lock(mutex_);
  for (;;) {
    stream.wake.wait(lock, [&] { return stop_ || !stream.queue.empty(); });
    if (stop_) return;
    Copy copy = std::move(stream.queue.front());
    stream.queue.pop_front();
    lock.unlock();
    const auto begin = Clock::now();
    std::exception_ptr failure;
    try {
      move_blocks(copy);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure) {
      failure_ = failure;
      finished_one_.notify_one();
      return;
    }
    if (bandwidth_ > 0) {
      const int64_t bytes = blocks_of(copy.runs) * pool_.block_bytes();
      stream.wake.wait_until(lock, begin + least_time(bytes, bandwidth_), [&] { return stop_; });
      if (stop_) return;
    }
    copy.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    finished_.push_back(std::move(copy));
    finished_one_.notify_one();
  }
}

void CopyEngine::move_blocks(const Copy& copy) const {
  std::vector<BlockMove> moves;
  for (const BlockRun& run : copy.runs) {
    moves.push_back({pool_.block(destination_tier(copy.direction), run.destination),
                     pool_.block(source_tier(copy.direction), run.source), run.count * pool_.block_bytes()});
  }
  pool_.backend().move_blocks(copy.direction == kOffload, moves);
}

}  // namespace fastserve
