#include "runtime/group.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "comm/plan_wire.h"
#include "common/check.h"

namespace fastserve {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kGoodbye = -1;  // plan_id of the last plan, which holds nothing
constexpr double kLookSeconds = 0.05;
constexpr auto kGatherLook = std::chrono::milliseconds(100);
// Of the timeout. Ranks of one stage wait for each other, too, and know better which one does not come: they say it
// first.
constexpr double kOthersFirst = 1.2;
constexpr double kLongestSeconds = 1e9;  // what the clock can count ends at nine times as many

// What it returns; when it throws, the group ends on all ranks.
template <class Body>
auto or_end_group(Runtime& runtime, const GroupLinks& links, Body&& body) {
  try {
    return body();
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    const std::string reason = runtime.abort(line_of(error, links.plans.members()[links.plans.rank()]));
    links.answers.abort(reason);
    links.plans.abort(reason);
    try {
      std::rethrow_exception(error);
    } catch (const Error&) {
      throw GroupError(reason);
    }
  }
}

template <class T>
std::span<std::byte> bytes_of(T& values) {
  return std::as_writable_bytes(std::span(values));
}

TimePoint after(double seconds) {
  if (seconds < 0 || seconds > kLongestSeconds) return kForever;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Rank 0's telling, which takes no longer than the timeout: others take what they are told at once, whatever they do.
// (At other times they may wait for each other as long as loading takes.)
class Limited {
 public:
  explicit Limited(const GroupLinks& links) : plans_(links.plans), before_(plans_.patience().seconds) {
    plans_.set_timeout(links.timeout);
  }
  ~Limited() { plans_.set_timeout(before_); }
  Limited(const Limited&) = delete;
  Limited& operator=(const Limited&) = delete;

 private:
  Communicator& plans_;
  const double before_;
};

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
    if (result->error) std::rethrow_exception(result->error);
    send_acknowledgement(links.answers, {result->plan_id, result->seconds, result->copies});
    if (links.answers.rank() == links.sampler) send_samples(links.answers, *result);
    ++answered;
  }
}

}  // namespace

Leader::Leader(Runtime& runtime, const GroupLinks& links) : runtime_(runtime), links_(links) {
  links.answers.set_timeout(links.timeout);  // of what follows a rank's first word on a plan
}

void Leader::submit(BatchPlan plan) {
  FS_CHECK(plan.plan_id != kGoodbye, "no plan may have the number ", kGoodbye);
  runtime_.check(plan);
  if (links_.sampler != 0) fill_in(plan);
  or_end_group(runtime_, links_, [&] {
    Limited limited(links_);
    broadcast_plan(links_.plans, plan, 0);
    runtime_.submit(std::move(plan));
  });
}

// Writes the tokens that are known, and remembers who will have sampled.
void Leader::fill_in(BatchPlan& plan) {
  std::lock_guard lock(mutex_);
  std::vector<int32_t> sampling;
  size_t token = 0;
  for (const PlanRow& row : plan.rows) {
    for (int32_t i = 0; i < row.tokens && token < plan.tokens.size(); ++i, ++token) {
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

std::optional<StepResult> Leader::poll(double seconds) {
  const TimePoint until = after(seconds);
  return or_end_group(runtime_, links_, [&]() -> std::optional<StepResult> {
    if (!own_) own_ = runtime_.poll(seconds);
    if (!own_) return std::nullopt;
    if (own_->error) std::rethrow_exception(own_->error);
    std::optional<Acknowledgement> all = gather(until);
    if (!all) return std::nullopt;
    StepResult result = std::move(*own_);
    own_.reset();
    waited_ = 0;
    result.seconds = all->seconds;
    result.copies = std::move(all->copies);
    if (links_.sampler != 0) {
      receive_samples(links_.answers, links_.sampler, result);
      note_samples(result);
    }
    return result;
  });
}

// Only what is spent in here counts, and of each look no more than it was to take: between two polls, or while this
// process stands still, nobody is waited for.
std::optional<Acknowledgement> Leader::gather(TimePoint until) {
  const Acknowledgement own{own_->plan_id, own_->seconds, own_->copies};
  for (;;) {
    const auto begin = Clock::now();
    const auto end = std::min<TimePoint>(until, begin + kGatherLook);
    if (auto all = acknowledgements_.gather(links_.answers, own, end)) return all;
    const auto now = Clock::now();
    waited_ += std::max(0.0, std::chrono::duration<double>(std::min(now, end) - begin).count());
    const std::vector<Member>& members = links_.answers.members();
    FS_CHECK(waited_ < kOthersFirst * links_.timeout, members[0].text(), " has waited ", waited_, " seconds for ",
             acknowledgements_.missing(links_.answers).text(), " to execute plan ", own.plan_id);
    if (now >= until) return std::nullopt;
  }
}

void Leader::note_samples(const StepResult& result) {
  std::lock_guard lock(mutex_);
  const std::vector<int32_t> sampling = std::move(sampling_.front());
  sampling_.pop_front();
  FS_CHECK(sampling.size() == result.sampled.size(), "plan ", result.plan_id, " came back with ", result.sampled.size(),
           " samples of ", sampling.size());
  for (size_t i = 0; i < sampling.size(); ++i) last_sampled_[sampling[i]] = std::max(0, result.sampled[i].token);
}

void Leader::close() {
  or_end_group(runtime_, links_, [&] {
    runtime_.flush();
    Limited limited(links_);
    BatchPlan goodbye;
    goodbye.plan_id = kGoodbye;
    broadcast_plan(links_.plans, goodbye, 0);
  });
}

void follow(Runtime& runtime, const GroupLinks& links) {
  std::atomic<int64_t> submitted = 0;
  std::atomic<bool> closing = false;
  std::exception_ptr failure;
  std::thread answering([&] {
    try {
      or_end_group(runtime, links, [&] { answer(runtime, links, submitted, closing); });
    } catch (...) {
      failure = std::current_exception();
    }
  });
  std::exception_ptr ended;
  try {
    or_end_group(runtime, links, [&] {
      for (;;) {
        BatchPlan plan;
        broadcast_plan(links.plans, plan, 0);
        if (plan.plan_id == kGoodbye) break;
        runtime.submit(std::move(plan));
        ++submitted;
      }
    });
  } catch (...) {
    ended = std::current_exception();
  }
  closing = true;
  answering.join();
  if (ended) std::rethrow_exception(ended);
  if (failure) std::rethrow_exception(failure);
  runtime.flush();
}

}  // namespace fastserve
