#include "runtime/shared_sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "common/check.h"

namespace fastserve {

namespace {

struct WireSample {
  int32_t token;
  float logprob;
  uint32_t top, error_bytes;  // which follow
};
struct WireTop {
  int32_t token;
  float logprob;
};
static_assert(sizeof(WireSample) == 16 && sizeof(WireTop) == 8);

void append(std::vector<std::byte>& buffer, const void* data, size_t bytes) {
  const auto* from = static_cast<const std::byte*>(data);
  buffer.insert(buffer.end(), from, from + bytes);
}

void take(std::span<const std::byte>& buffer, void* data, size_t bytes) {
  FS_CHECK(bytes <= buffer.size(), "samples came damaged: ", buffer.size(), " bytes where ", bytes, " are due");
  if (bytes > 0) std::memcpy(data, buffer.data(), bytes);
  buffer = buffer.subspan(bytes);
}

template <class T>
std::span<std::byte> bytes_of(std::vector<T>& values) {
  return std::as_writable_bytes(std::span(values));
}

}  // namespace

std::vector<std::byte> encode_samples(std::span<const Sampled> samples) {
  std::vector<std::byte> buffer;
  for (const Sampled& sample : samples) {
    const WireSample wire{sample.token, sample.logprob, static_cast<uint32_t>(sample.top.size()),
                          static_cast<uint32_t>(sample.error.size())};
    append(buffer, &wire, sizeof wire);
    for (const auto& [token, logprob] : sample.top) {
      const WireTop top{token, logprob};
      append(buffer, &top, sizeof top);
    }
    append(buffer, sample.error.data(), sample.error.size());
  }
  return buffer;
}

std::vector<Sampled> decode_samples(std::span<const std::byte> buffer) {
  std::vector<Sampled> samples;
  while (!buffer.empty()) {
    WireSample wire;
    take(buffer, &wire, sizeof wire);
    Sampled& sample = samples.emplace_back(Sampled{wire.token, wire.logprob, {}, {}});
    for (uint32_t i = 0; i < wire.top; ++i) {
      WireTop top;
      take(buffer, &top, sizeof top);
      sample.top.emplace_back(top.token, top.logprob);
    }
    FS_CHECK(wire.error_bytes <= buffer.size(), "samples came damaged: an error of ", wire.error_bytes, " bytes");
    sample.error.resize(wire.error_bytes);
    take(buffer, sample.error.data(), wire.error_bytes);
  }
  return samples;
}

SharedSampling::SharedSampling(Communicator& ranks, const Shard& shard, int64_t vocab_size)
    : ranks_(ranks), vocab_size_(vocab_size), first_tokens_(ranks.size()), num_tokens_(ranks.size()) {
  const std::array<int64_t, 1> first{shard.first_token}, count{shard.num_tokens};
  ranks.all_gather(std::as_bytes(std::span(first)), bytes_of(first_tokens_));
  ranks.all_gather(std::as_bytes(std::span(count)), bytes_of(num_tokens_));
}

// Straight from where the logits are to where a row is put together: for large vocabularies each copy would count.
float* SharedSampling::exchange(const float* local, int64_t ld, std::span<const int64_t> rows) {
  const int size = ranks_.size(), me = ranks_.rank();
  const auto count = static_cast<int64_t>(rows.size());
  const size_t bytes = ceil_div(count, size) * ld_rows() * sizeof(float);
  if (rows_.bytes() < bytes) rows_ = Buffer(bytes);
  std::vector<Request> requests;
  for (int64_t i = 0; i < count; ++i) {
    const std::span<const float> columns(local + rows[i] * ld, num_tokens_[me]);
    if (!mine(i)) {
      requests.push_back(ranks_.send(std::as_bytes(columns), static_cast<int>(i % size)));
      continue;
    }
    float* row = rows_.as<float>() + i / size * ld_rows();
    std::copy(columns.begin(), columns.end(), row + first_tokens_[me]);
    for (int r = 0; r < size; ++r) {
      if (r == me) continue;
      const std::span<float> theirs(row + first_tokens_[r], num_tokens_[r]);
      requests.push_back(ranks_.receive(std::as_writable_bytes(theirs), r));
    }
  }
  for (const Request& request : requests) ranks_.wait(*request);
  return rows_.as<float>();
}

void SharedSampling::gather(std::vector<Sampled>& samples) {
  std::vector<Sampled> own;
  for (size_t i = 0; i < samples.size(); ++i) {
    if (mine(static_cast<int64_t>(i))) own.push_back(std::move(samples[i]));
  }
  const std::vector<std::byte> buffer = encode_samples(own);
  const std::array<int64_t, 1> length{static_cast<int64_t>(buffer.size())};
  std::vector<int64_t> lengths(ranks_.size());
  ranks_.all_gather(std::as_bytes(std::span(length)), bytes_of(lengths));
  int64_t total = 0;
  for (const int64_t each : lengths) total += each;
  std::vector<std::byte> all(total);
  ranks_.all_gather(buffer, all, lengths);
  std::span<const std::byte> rest = all;
  for (int r = 0; r < ranks_.size(); ++r) {
    std::vector<Sampled> theirs = decode_samples(rest.first(lengths[r]));
    rest = rest.subspan(lengths[r]);
    size_t index = r;
    for (Sampled& sample : theirs) {
      FS_CHECK(index < samples.size(), "rank ", r, " of the stage sampled more than ", samples.size(), " rows");
      samples[index] = std::move(sample);
      index += ranks_.size();
    }
  }
}

std::vector<float> SharedSampling::gather_logits(const float* local, int64_t ld, int64_t count) {
  std::vector<float> mine, all(count * vocab_size_), rows(count * vocab_size_);
  std::vector<int64_t> bytes;
  for (int64_t i = 0; i < count; ++i) {
    mine.insert(mine.end(), local + i * ld, local + i * ld + num_tokens_[ranks_.rank()]);
  }
  for (const int64_t tokens : num_tokens_) bytes.push_back(count * tokens * static_cast<int64_t>(sizeof(float)));
  ranks_.all_gather(bytes_of(mine), bytes_of(all), bytes);
  const float* columns = all.data();
  for (int r = 0; r < ranks_.size(); ++r) {
    for (int64_t i = 0; i < count; ++i, columns += num_tokens_[r]) {
      std::copy_n(columns, num_tokens_[r], rows.data() + i * vocab_size_ + first_tokens_[r]);
    }
  }
  return rows;
}

}  // namespace fastserve
