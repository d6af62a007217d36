#include "backend/cuda/batch_clock.h"

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

namespace {
double seconds_between(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, from, to));
  return 1e-3 * static_cast<double>(milliseconds);
}
}  // namespace

BatchClock& BatchClock::instance() {
  static BatchClock clock;
  return clock;
}

void BatchClock::start(int64_t most) {
  static_cast<void>(take());
  events_.resize(most);
  for (Events& events : events_) {
    check(cudaEventCreate(&events.begin));
    check(cudaEventCreate(&events.end));
  }
  running_.store(true, std::memory_order_release);
}

void BatchClock::record_begin(cudaStream_t stream) {
  if (begun_ < events_.size() && begun_ == ended_) check(cudaEventRecord(events_[begun_++].begin, stream));
}

void BatchClock::record_end(cudaStream_t stream) {
  if (ended_ < begun_) check(cudaEventRecord(events_[ended_++].end, stream));
}

std::vector<BatchSpan> BatchClock::take() {
  running_.store(false, std::memory_order_release);
  std::vector<BatchSpan> spans;
  if (ended_ > 0) check(cudaEventSynchronize(events_[ended_ - 1].end));
  for (size_t i = 0; i < ended_; ++i) {  // one step at a time, as the difference is told in a float
    const double begin = i == 0 ? 0 : spans.back().end + seconds_between(events_[i - 1].end, events_[i].begin);
    spans.push_back({begin, begin + seconds_between(events_[i].begin, events_[i].end)});
  }
  for (const Events& events : events_) {
    static_cast<void>(cudaEventDestroy(events.begin));
    static_cast<void>(cudaEventDestroy(events.end));
  }
  events_.clear();
  begun_ = ended_ = 0;
  return spans;
}

}  // namespace fastserve::cuda
