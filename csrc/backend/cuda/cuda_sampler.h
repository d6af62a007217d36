// Chooses tokens on the device.
#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "backend/cuda/count_tables.h"
#include "backend/cuda/sampling.h"
#include "backend/cuda/transfers.h"
#include "model/token_sampler.h"

namespace fastserve::cuda {

class CudaSampler final : public TokenSampler {
 public:
  // Calls `moved` when last_sampled() has changed.
  CudaSampler(int64_t vocab_size, cudaStream_t stream, std::function<void()> moved);

  // [slots], on the device: the tokens that stand for last_of().
  const int32_t* last_sampled() const { return last_sampled_.as<int32_t>(); }

  void reserve(int64_t most) override;
  void open(int32_t slot, const SamplingParams& params, std::span<const int32_t> prompt,
            std::span<const int32_t> outputs) override;
  void close(int32_t slot) override;
  void sample(float* logits, int64_t ld, std::span<const SampleRequest> requests) override;
  std::vector<Sampled> take() override;
  void drop_latest() override;
  void drop_oldest() override;
  int32_t last_of(int32_t slot) const override { return -1 - jobs_.at(slot).place; }
  void note(int32_t slot, int32_t token) override;

 private:
  struct Job {
    SamplingParams params;                // no bias of a token twice
    int32_t place;                        // in last_sampled_
    std::shared_ptr<CountedJob> counted;  // where penalties look at its tokens
  };
  struct Row {
    int32_t alternatives;                 // -1: not even the token's logprob
    std::shared_ptr<CountedJob> counted;  // perhaps of a job that is gone
  };
  struct Batch {
    Transfer* transfer;
    std::vector<Row> rows;
    size_t tops_offset;
  };

  void make_places(int64_t wanted);
  int32_t take_place();
  void drop(const Batch& batch);
  SampleRow row_of(const SampleRequest& request);

  const int64_t vocab_size_;
  const cudaStream_t stream_;
  const std::function<void()> moved_;

  std::unordered_map<int32_t, Job> jobs_;
  std::vector<int32_t> places_;  // that are free
  Memory last_sampled_, workspace_, results_;
  Uploads rows_;
  CountTables counts_;

  // Of the batch that is put together.
  std::vector<SampleBias> biases_;
  std::vector<int32_t> stops_;
  std::vector<std::byte> bytes_;

  std::array<Transfer, kTransfers> transfers_;
  size_t next_ = 0;
  std::deque<Batch> sampling_;
};

}  // namespace fastserve::cuda
