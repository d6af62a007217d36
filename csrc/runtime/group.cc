#include "runtime/group.h"

#include <array>
#include <atomic>
#include <exception>
#include <thread>
#include <utility>

#include "comm/plan_wire.h"
#include "common/check.h"

namespace fastserve {

namespace {

constexpr int64_t kGoodbye = -1;  // plan_id of the last plan, which holds nothing
constexpr double kLookSeconds = 0.05;

std::string text_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& caught) {
    return caught.what();
  } catch (...) {
    return "an error of an unknown kind";
  }
}

template <class T>
std::span<std::byte> bytes_of(T& values) {
  return std::as_writable_bytes(std::span(values));
}

struct SamplesHead {
  uint64_t sample_bytes, logits;
};

void send_samples(Communicator& answers, const StepResult& result) {
  std::vector<std::byte> samples = encode_samples(result.sampled);
  std::array<SamplesHead, 1> head{{{samples.size(), result.logits.size()}}};
  std::vector<Request> requests{answers.send(bytes_of(head), 0)};
  if (!samples.empty()) requests.push_back(answers.send(samples, 0));
  if (!result.logits.empty()) requests.push_back(answers.send(std::as_bytes(std::span(result.logits)), 0));
  for (const Request& request : requests) answers.wait(*request);
}

void receive_samples(Communicator& answers, int from, StepResult& result) {
  std::array<SamplesHead, 1> head;
  answers.wait(*answers.receive(bytes_of(head), from));
  std::vector<std::byte> samples(head[0].sample_bytes);
  if (!samples.empty()) answers.wait(*answers.receive(samples, from));
  result.sampled = decode_samples(samples);
  result.logits.resize(head[0].logits);
  if (!result.logits.empty()) answers.wait(*answers.receive(bytes_of(result.logits), from));
}

// A follower's second thread: tells rank 0 of every result.
void answer(Runtime& runtime, const GroupLinks& links, const std::atomic<int64_t>& submitted,
            const std::atomic<bool>& closing) {
  for (int64_t answered = 0; !closing || answered < submitted;) {
    std::optional<StepResult> result = runtime.poll(kLookSeconds);
    if (!result) continue;
    Acknowledgement own{result->plan_id, result->seconds, result->copies, {}};
    if (result->error) own.error = text_of(result->error);
    send_acknowledgement(links.answers, own);
    if (links.answers.rank() == links.sampler && !result->error) send_samples(links.answers, *result);
    ++answered;
  }
}

}  // namespace

void Leader::submit(BatchPlan plan) {
  if (links_.sampler != 0) {
    std::lock_guard lock(mutex_);
    std::vector<int32_t> sampling;
    size_t token = 0;
    for (const PlanRow& row : plan.rows) {
      for (int32_t i = 0; i < row.tokens; ++i, ++token) {
        if (plan.tokens[token] != -1) continue;
        const auto known = last_sampled_.find(row.slot);
        FS_CHECK(known != last_sampled_.end(), "slot ", row.slot, " has not sampled a token");
        plan.tokens[token] = known->second;
      }
      if (row.logits > 0) sampling.push_back(row.slot);
    }
    for (const int32_t slot : plan.closed) last_sampled_.erase(slot);
    sampling_.push_back(std::move(sampling));
  }
  broadcast_plan(links_.plans, plan, 0);
  runtime_.submit(std::move(plan));
}

std::optional<StepResult> Leader::poll(double seconds) {
  std::optional<StepResult> result = runtime_.poll(seconds);
  if (!result) return result;
  const std::string error = result->error ? text_of(result->error) : "";
  const Acknowledgement all =
      acknowledgements_.gather(links_.answers, {result->plan_id, result->seconds, result->copies, error});
  result->seconds = all.seconds;
  result->copies = all.copies;
  if (links_.sampler == 0) return result;
  receive_samples(links_.answers, links_.sampler, *result);
  std::lock_guard lock(mutex_);
  const std::vector<int32_t> sampling = std::move(sampling_.front());
  sampling_.pop_front();
  FS_CHECK(sampling.size() == result->sampled.size(), "plan ", result->plan_id, " came back with ",
           result->sampled.size(), " samples of ", sampling.size());
  for (size_t i = 0; i < sampling.size(); ++i) last_sampled_[sampling[i]] = std::max(0, result->sampled[i].token);
  return result;
}

void Leader::close() {
  BatchPlan goodbye;
  goodbye.plan_id = kGoodbye;
  broadcast_plan(links_.plans, goodbye, 0);
}

void follow(Runtime& runtime, const GroupLinks& links) {
  std::atomic<int64_t> submitted = 0;
  std::atomic<bool> closing = false;
  std::exception_ptr failure;
  std::thread answering([&] {
    try {
      answer(runtime, links, submitted, closing);
    } catch (const std::exception& error) {
      failure = std::current_exception();
      links.plans.abort(error.what());  // the thread below waits for the next plan
    }
  });
  std::exception_ptr ended;
  try {
    for (;;) {
      BatchPlan plan;
      broadcast_plan(links.plans, plan, 0);
      if (plan.plan_id == kGoodbye) break;
      runtime.submit(std::move(plan));
      ++submitted;
    }
  } catch (const std::exception& error) {
    ended = std::current_exception();
    links.answers.abort(error.what());
  }
  closing = true;
  answering.join();
  if (failure) std::rethrow_exception(failure);
  if (ended) std::rethrow_exception(ended);
}

}  // namespace fastserve
