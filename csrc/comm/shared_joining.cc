#include "comm/shared_joining.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "comm/futex.h"
#include "common/check.h"

namespace fastserve {

namespace {
using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr double kJoinSeconds = 120;
constexpr auto kLookTime = std::chrono::milliseconds(100);  // between looks after the others
}  // namespace

Joined join_segment(const std::string& path, int rank, int size, const Member& self, const Patience& patience) {
  const SharedLayout layout{size};
  auto segment = std::make_unique<Segment>(path, layout.bytes());
  const auto desk = [&](int r) -> Desk& { return *reinterpret_cast<Desk*>(segment->data() + layout.desk(r)); };
  segment->hold(rank);
  desk(rank).member = self;
  sched_getaffinity(0, sizeof(cpu_set_t), &desk(rank).cores);
  desk(rank).state.store(kHere);

  const auto begin = Clock::now();
  const double limit = std::min(kJoinSeconds, patience.seconds);
  std::vector<Member> members;
  for (auto next_look = begin + kLookTime; static_cast<int>(members.size()) < size;) {
    const int next = static_cast<int>(members.size());
    if (desk(next).state.load() != kAbsent) {
      members.push_back(desk(next).member);
      continue;
    }
    const auto& header = *reinterpret_cast<SharedHeader*>(segment->data());
    if (header.aborted.load(std::memory_order_acquire) == kYes) throw Error(header.reason);
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    if (Clock::now() < next_look) continue;
    next_look += kLookTime;
    FS_CHECK(Seconds(Clock::now() - begin).count() < limit, "rank ", next, " of ", size, " on ", self.host,
             " has not come within ", limit, " seconds");
    if (patience.ask) patience.ask();
  }
  return {std::move(segment), std::move(members)};
}

void abort_all(Segment& segment, const SharedLayout& layout, const std::string& reason) {
  auto& header = *reinterpret_cast<SharedHeader*>(segment.data());
  uint32_t expected = kNo;
  if (!header.aborted.compare_exchange_strong(expected, kWriting)) return;  // the first reason is the one to know
  reason.copy(header.reason, sizeof(SharedHeader::reason) - 1);
  header.aborted.store(kYes);
  for (int r = 0; r < layout.size; ++r) {
    Desk& desk = *reinterpret_cast<Desk*>(segment.data() + layout.desk(r));
    desk.bell.fetch_add(1);
    futex_wake(desk.bell);
  }
}

}  // namespace fastserve
