#include "backend/cpu/host_sampler.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <unordered_map>
#include <utility>

#include "backend/cpu/kernels.h"
#include "common/check.h"

namespace fastserve {

namespace {

class HostSampler final : public TokenSampler {
 public:
  HostSampler(ThreadPool& threads, int64_t vocab_size)
      : threads_(threads), vocab_size_(vocab_size), kernels_(cpu::select_kernels().logits) {}

  void reserve(int64_t) override {}

  void open(int32_t slot, const SamplingParams& params, std::span<const int32_t> prompt,
            std::span<const int32_t> outputs) override {
    Job& job = jobs_[slot] = {params, {}};
    for (const int32_t token : prompt) job.counts.add_prompt(token);
    for (const int32_t token : outputs) job.counts.add_output(token);
  }
  void close(int32_t slot) override { jobs_.erase(slot); }

  void sample(float* logits, int64_t ld, std::span<const SampleRequest> requests) override {
    std::vector<Sampled> sampled(requests.size());
    threads_.run(static_cast<int64_t>(requests.size()), [&](int64_t i, int) {
      const auto& [row, slot, output_index] = requests[i];
      const Job& job = jobs_.at(slot);
      try {
        sampled[i] = fastserve::sample(kernels_, {logits + row * ld, static_cast<size_t>(vocab_size_)}, job.params,
                                       job.counts, output_index);
      } catch (const std::exception& error) {
        sampled[i] = {.token = -1, .logprob = std::nanf(""), .top = {}, .error = error.what()};
      }
    });
    for (size_t i = 0; i < requests.size(); ++i) note(requests[i].slot, sampled[i].token);
    sampled_.push_back(std::move(sampled));
  }

  std::vector<Sampled> take() override {
    std::vector<Sampled> oldest = std::move(sampled_.front());
    sampled_.pop_front();
    return oldest;
  }
  void drop_latest() override { sampled_.pop_back(); }
  void drop_oldest() override { sampled_.pop_front(); }

  int32_t last_of(int32_t slot) const override {
    FS_CHECK(false, "slot ", slot, " is asked for a token to come, where none is");
  }

  void note(int32_t slot, int32_t token) override {
    Job& job = jobs_.at(slot);
    if (job.params.needs_history()) job.counts.add_output(std::max(0, token));
  }

 private:
  struct Job {
    SamplingParams params;
    TokenCounts counts;
  };

  ThreadPool& threads_;
  const int64_t vocab_size_;
  const LogitKernels& kernels_;
  std::unordered_map<int32_t, Job> jobs_;
  std::deque<std::vector<Sampled>> sampled_;
};

}  // namespace

std::unique_ptr<TokenSampler> make_host_sampler(ThreadPool& threads, int64_t vocab_size) {
  return std::make_unique<HostSampler>(threads, vocab_size);
}

}  // namespace fastserve
