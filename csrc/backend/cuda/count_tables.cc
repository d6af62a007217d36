#include "backend/cuda/count_tables.h"

#include <algorithm>
#include <span>

#include "backend/cuda/sampling.h"

namespace fastserve::cuda {

namespace {
constexpr size_t kTokenBytes = size_t{1} << 20;  // of what jobs have seen, which there is room for at once
}

void CountTables::allocate(int64_t tables) {
  const int64_t elements = count_table_size(vocab_size_);
  memory_.emplace_back(Place::kDevice, tables * elements * sizeof(uint32_t));
  for (int64_t i = tables; i-- > 0;) free_.push_back(memory_.back().as<uint32_t>() + i * elements);
  tables_ += tables;
}

void CountTables::reserve(int64_t jobs) {
  if (jobs > tables_) allocate(jobs - tables_);
  uploads_.reserve(kTokenBytes, stream_);
}

// Of whose batch is longest ago, where none is free. What is queued for that job comes before what is queued next.
uint32_t* CountTables::take(uint64_t batch) {
  if (free_.empty()) {
    const auto oldest = std::ranges::min_element(owners_, {}, [](const CountedJob* job) { return job->batch; });
    if (oldest != owners_.end() && (*oldest)->batch < batch) {
      drop(**oldest);
    } else {
      allocate(std::max<int64_t>(tables_, 4));
    }
  }
  uint32_t* const table = free_.back();
  free_.pop_back();
  return table;
}

void CountTables::drop(CountedJob& job) {
  if (job.table == nullptr) return;
  free_.push_back(job.table);
  job.table = nullptr;
  std::erase(owners_, &job);
}

void CountTables::bring(const std::vector<CountedJob*>& jobs) {
  const uint64_t batch = ++batches_;
  for (CountedJob* job : jobs) job->batch = batch;  // none of them loses its table to another
  struct Filling {
    const CountedJob* job;
    size_t prompt, outputs;
  };
  std::vector<Filling> filling;
  words_.clear();
  const auto append = [&](const std::vector<int32_t>& tokens) {
    const size_t at = words_.size();
    words_.insert(words_.end(), tokens.begin(), tokens.end());
    return at;
  };
  for (CountedJob* job : jobs) {
    if (job->table != nullptr) continue;
    job->table = take(batch);
    owners_.push_back(job);
    const size_t prompt = append(job->prompt);
    filling.push_back({job, prompt, append(job->outputs)});
  }
  if (filling.empty()) return;
  words_.push_back(0);  // so that there is something
  const auto bytes = std::as_bytes(std::span(words_));
  const auto* tokens = reinterpret_cast<const int32_t*>(uploads_.reserve(bytes.size(), stream_));
  uploads_.upload(bytes, stream_);
  for (const auto& [job, prompt, outputs] : filling) {
    count_tokens(job->table, vocab_size_, tokens + prompt, static_cast<int64_t>(job->prompt.size()), tokens + outputs,
                 static_cast<int64_t>(job->outputs.size()), stream_);
  }
}

}  // namespace fastserve::cuda
