#include "backend/cuda/cuda_sampler.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "common/dtype.h"

namespace fastserve::cuda {

namespace {

constexpr int64_t kPlaces = 64;        // to begin with, ...
constexpr int64_t kManyPlaces = 4096;  // ... or where memory is reserved
constexpr size_t kListedBytes = 1024;  // of a row's biases and stop tokens, which there is room for at once

std::vector<std::pair<int32_t, float>> summed(const std::vector<std::pair<int32_t, float>>& biases) {
  std::map<int32_t, float> sums;
  for (const auto& [token, bias] : biases) sums[token] += bias;
  return {sums.begin(), sums.end()};
}

template <class T>
size_t append(std::vector<std::byte>& bytes, const std::vector<T>& values) {
  const size_t at = round_up(static_cast<int64_t>(bytes.size()), 16);
  bytes.resize(at + values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

// What is read back of so many rows: results, then the alternatives to them.
size_t tops_offset(int64_t rows) { return round_up(rows * static_cast<int64_t>(sizeof(SampleResult)), 16); }
size_t results_bytes(int64_t rows) { return tops_offset(rows) + rows * kMaxTop * sizeof(TopToken); }

void reserve(Memory& memory, size_t bytes, cudaStream_t stream) {
  if (memory.bytes() >= bytes) return;
  check(cudaStreamSynchronize(stream));  // what is queued works on the one before
  memory = Memory(Place::kDevice, std::bit_ceil(bytes));
}

}  // namespace

CudaSampler::CudaSampler(int64_t vocab_size, cudaStream_t stream, std::function<void()> moved)
    : vocab_size_(vocab_size), stream_(stream), moved_(std::move(moved)), counts_(vocab_size, stream) {
  FS_CHECK(vocab_size <= kMaxVocab, "the CUDA backend samples from at most ", kMaxVocab, " tokens, the model has ",
           vocab_size);
}

void CudaSampler::reserve(int64_t most) {
  make_places(kManyPlaces);  // jobs that are not in a batch have one, too
  cuda::reserve(results_, results_bytes(most), stream_);
  const int64_t biases = most * static_cast<int64_t>(kListedBytes / sizeof(SampleBias));
  cuda::reserve(workspace_, sample_workspace(most, vocab_size_, biases), stream_);
  for (Transfer& transfer : transfers_) transfer.reserve(results_bytes(most));
  rows_.reserve(most * (sizeof(SampleRow) + kListedBytes), stream_);
  counts_.reserve(most);
}

void CudaSampler::open(int32_t slot, const SamplingParams& params, std::span<const int32_t> prompt,
                       std::span<const int32_t> outputs) {
  FS_CHECK(params.logprobs <= kMaxTop, "the CUDA backend reports at most ", kMaxTop, " alternatives of a token, not ",
           params.logprobs);
  close(slot);
  Job job{params, take_place(), nullptr};
  job.params.bias = summed(params.bias);
  if (params.needs_history()) {
    job.counted = std::make_shared<CountedJob>();
    job.counted->prompt.assign(prompt.begin(), prompt.end());
    job.counted->outputs.assign(outputs.begin(), outputs.end());
  }
  jobs_.emplace(slot, std::move(job));
}

// What is queued may still write there; what comes after is queued behind it.
void CudaSampler::close(int32_t slot) {
  const auto job = jobs_.find(slot);
  if (job == jobs_.end()) return;
  places_.push_back(job->second.place);
  if (job->second.counted) counts_.drop(*job->second.counted);
  jobs_.erase(job);
}

void CudaSampler::make_places(int64_t wanted) {
  const auto held = static_cast<int64_t>(last_sampled_.bytes() / sizeof(int32_t));
  if (wanted <= held) return;
  Memory larger(Place::kDevice, wanted * sizeof(int32_t));
  check(cudaStreamSynchronize(stream_));
  if (held > 0) {
    check(cudaMemcpyAsync(larger.as<void>(), last_sampled_.as<void>(), last_sampled_.bytes(), cudaMemcpyDeviceToDevice,
                          stream_));
    check(cudaStreamSynchronize(stream_));
  }
  last_sampled_ = std::move(larger);
  for (int64_t place = wanted; place-- > held;) places_.push_back(static_cast<int32_t>(place));
  moved_();
}

int32_t CudaSampler::take_place() {
  const auto held = static_cast<int64_t>(last_sampled_.bytes() / sizeof(int32_t));
  if (places_.empty()) make_places(std::max(kPlaces, 2 * held));
  const int32_t place = places_.back();
  places_.pop_back();
  return place;
}

SampleRow CudaSampler::row_of(const SampleRequest& request) {
  const Job& job = jobs_.at(request.slot);
  const SamplingParams& params = job.params;
  SampleRow row;
  row.logits = static_cast<int32_t>(request.row);
  row.slot = job.place;
  row.output_index = request.output_index;
  row.seed = params.seed;
  row.set_temperature(params.temperature, params.min_p);
  row.top_k = params.top_k;
  row.top_p = params.top_p;
  row.logprobs = params.logprobs;
  row.bias = static_cast<int32_t>(biases_.size());
  for (const auto& [token, bias] : params.bias) biases_.push_back({token, bias});
  row.biases = static_cast<int32_t>(biases_.size()) - row.bias;
  row.stop = static_cast<int32_t>(stops_.size());
  if (request.output_index < params.min_tokens) {
    stops_.insert(stops_.end(), params.stop_tokens.begin(), params.stop_tokens.end());
  }
  row.stops = static_cast<int32_t>(stops_.size()) - row.stop;
  row.repetition_penalty = params.repetition_penalty;
  row.presence_penalty = params.presence_penalty;
  row.frequency_penalty = params.frequency_penalty;
  row.counts = job.counted ? job.counted->table : nullptr;
  return row;
}

void CudaSampler::sample(float* logits, int64_t ld, std::span<const SampleRequest> requests) {
  const auto count = static_cast<int64_t>(requests.size());
  Transfer& transfer = transfers_[next_];
  next_ = (next_ + 1) % kTransfers;
  Batch batch{&transfer, {}, tops_offset(count)};
  std::vector<CountedJob*> counted;
  for (const SampleRequest& request : requests) {
    const Job& job = jobs_.at(request.slot);
    batch.rows.push_back({job.params.logprobs, job.counted});
    if (job.counted) counted.push_back(job.counted.get());
  }
  counts_.bring(counted);
  std::vector<SampleRow> rows;
  biases_.clear();
  stops_.clear();
  bool draws = false, tops = false;
  for (const SampleRequest& request : requests) {
    rows.push_back(row_of(request));
    draws = draws || jobs_.at(request.slot).params.temperature != 0.0f;
    tops = tops || rows.back().logprobs > 0;
  }
  if (count > 0) {
    bytes_.clear();
    const size_t rows_at = append(bytes_, rows), biases_at = append(bytes_, biases_), stops_at = append(bytes_, stops_);
    const std::byte* given = rows_.reserve(bytes_.size() + 16, stream_);
    rows_.upload(bytes_, stream_);
    cuda::reserve(results_, results_bytes(count), stream_);
    cuda::reserve(workspace_, sample_workspace(count, vocab_size_, static_cast<int64_t>(biases_.size())), stream_);
    cuda::sample({.num_rows = count,
                  .vocab = vocab_size_,
                  .ld = ld,
                  .draws = draws,
                  .logits = logits,
                  .rows = reinterpret_cast<const SampleRow*>(given + rows_at),
                  .biases = reinterpret_cast<const SampleBias*>(given + biases_at),
                  .stop_tokens = reinterpret_cast<const int32_t*>(given + stops_at),
                  .last_sampled = last_sampled_.as<int32_t>(),
                  .results = results_.as<SampleResult>(),
                  .tops = reinterpret_cast<TopToken*>(results_.as<std::byte>() + batch.tops_offset),
                  .workspace = workspace_.as<void>()},
                 stream_);
    const size_t bytes = tops ? results_bytes(count) : batch.tops_offset;
    queue_copy(transfer.reserve(bytes), results_.as<void>(), bytes, stream_);
    transfer.mark(stream_);
  }
  sampling_.push_back(std::move(batch));
}

std::vector<Sampled> CudaSampler::take() {
  const Batch batch = std::move(sampling_.front());
  sampling_.pop_front();
  std::vector<Sampled> sampled;
  if (batch.rows.empty()) return sampled;
  const auto* bytes = static_cast<const std::byte*>(batch.transfer->reserve(0));  // waits for the copy
  const auto* results = reinterpret_cast<const SampleResult*>(bytes);
  const auto* tops = reinterpret_cast<const TopToken*>(bytes + batch.tops_offset);
  for (size_t i = 0; i < batch.rows.size(); ++i, tops += kMaxTop) {
    Sampled& each = sampled.emplace_back(Sampled{results[i].token, results[i].logprob, {}, {}});
    if (results[i].error != SampleError::kNone) {
      each = {.token = -1, .logprob = std::nanf(""), .top = {}, .error = describe(results[i].error)};
      continue;
    }
    if (batch.rows[i].counted) batch.rows[i].counted->outputs.push_back(results[i].token);
    for (int32_t j = 0; j < batch.rows[i].alternatives && tops[j].token >= 0; ++j) {
      each.top.emplace_back(tops[j].token, tops[j].logprob);
    }
  }
  return sampled;
}

// Whether their tokens were counted on the device nobody knows.
void CudaSampler::drop(const Batch& batch) {
  for (const Row& row : batch.rows) {
    if (row.counted) counts_.drop(*row.counted);
  }
}

void CudaSampler::drop_latest() {
  drop(sampling_.back());
  sampling_.pop_back();
}

void CudaSampler::drop_oldest() {
  drop(sampling_.front());
  sampling_.pop_front();
}

void CudaSampler::note(int32_t slot, int32_t) {
  FS_CHECK(false, "slot ", slot, " is sampled on this device, and nowhere else");
}

}  // namespace fastserve::cuda
