#include "machine/block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "common/check.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr unsigned char kPoison = 0xff;  // every element type's NaN
constexpr size_t kGuard = 4096;          // bytes on each side of a block's shared memory

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && same(a.file_name(), b.file_name());
}

std::string hex(unsigned value) {
  std::ostringstream text;
  text << "0x" << std::hex << value;
  return text.str();
}

}  // namespace

Block& block() {
  static Block the_block;
  return the_block;
}

std::string short_path(const std::string& path) {
  const size_t csrc = path.rfind("csrc/"), tests = path.rfind("tests/");
  return path.substr(csrc != std::string::npos ? csrc : tests != std::string::npos ? tests : 0);
}

std::string describe(const Site& site) { return join(short_path(site.file_name()), ':', site.line()); }

void Block::begin(const Launch& launch, const std::function<void()>& body, uint64_t seed) {
  const size_t count = size_t{launch.block.x} * launch.block.y * launch.block.z;
  launch_ = &launch;
  body_ = &body;
  random_ = Random(seed);
  error_.clear();
  exception_ = nullptr;
  blockDim = launch.block;
  gridDim = launch.grid;
  threads_.resize(count);
  warps_.resize((count + kLanes - 1) / kLanes);
  for (size_t i = 0; i < count; ++i) {
    const auto linear = static_cast<unsigned>(i);
    threads_[i].index = {linear % launch.block.x, linear / launch.block.x % launch.block.y,
                         linear / launch.block.x / launch.block.y};
    threads_[i].warp = i / kLanes;
    threads_[i].lane = static_cast<int>(i % kLanes);
  }
  shared_.resize(launch.shared_bytes + 2 * kGuard + 128);
  const auto begin = reinterpret_cast<uintptr_t>(shared_.data()) + kGuard;
  shared_offset_ = (begin + 127) / 128 * 128 - reinterpret_cast<uintptr_t>(shared_.data());
}

void Block::run(uint3 index) {
  blockIdx = index;
  std::memset(shared_.data(), kPoison, shared_.size());
  ready_.clear();
  for (Warp& warp : warps_) {
    warp.late = random_.next() % 4 == 0;
    warp.alive = 0;
    warp.meetings.clear();
  }
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.state = Thread::State::kReady;
    thread.copies.clear();
    thread.copy_groups.clear();
    warps_[thread.warp].alive |= 1u << thread.lane;
    prepare(thread.context, stacks_.bottom(i), i, thread_main);
    ready_.push_back(i);
  }
  live_ = threads_.size();
  at_barrier_ = 0;
  any_ = false;
  while (live_ > 0) {
    if (ready_.empty()) report_deadlock();
    round_.swap(ready_);
    ready_.clear();
    random_.shuffle(round_);
    hold_back_late();
    for (const size_t i : round_) {
      running_ = &threads_[i];
      threadIdx = running_->index;
      switch_context(scheduler_, running_->context);
      running_ = nullptr;
      if (exception_) std::rethrow_exception(exception_);
      if (!error_.empty()) throw fastserve::Error(error_);
    }
  }
  check_guards();
}

// A GPU's warps are not as fair as rounds are: one may be at a barrier before another has begun.
void Block::hold_back_late() {
  const auto is_late = [&](size_t i) { return warps_[threads_[i].warp].late; };
  const auto late = std::partition(round_.begin(), round_.end(), std::not_fn(is_late));
  if (late == round_.begin()) return;
  ready_.assign(late, round_.end());
  round_.erase(late, round_.end());
}

void Block::end() {
  running_ = nullptr;
  launch_ = nullptr;
  body_ = nullptr;
}

void Block::thread_main() {
  Block& self = block();
  begin_context(self.scheduler_);
  try {
    (*self.body_)();
  } catch (...) {
    self.exception_ = std::current_exception();
  }
  if (!self.exception_) self.exit_thread();
  switch_context(self.running_->context, self.scheduler_, true);
  __builtin_unreachable();
}

void Block::exit_thread() {
  Thread& thread = *running_;
  for (const Meeting& meeting : warps_[thread.warp].meetings) {
    if (meeting.mask >> thread.lane & 1u) {
      fault(join("has exited, but ", name(threads_[meeting.first]), " waits for it in ", meeting.operation, " at ",
                 describe(meeting.site)));
    }
  }
  if (at_barrier_ > 0) {
    const Thread& first = threads_[first_at_barrier_];
    fault(join("has exited, but ", name(first), " waits for it in ", first.operation, " at ", describe(first.site)));
  }
  thread.state = Thread::State::kExited;
  warps_[thread.warp].alive &= ~(1u << thread.lane);
  --live_;
}

void Block::pause() { switch_context(running_->context, scheduler_); }

void Block::release(Thread& thread) {
  thread.state = Thread::State::kReady;
  ready_.push_back(static_cast<size_t>(&thread - threads_.data()));
}

void Block::meet(const char* operation, unsigned mask, const Site& site, void* payload, Resolve resolve) {
  Thread& self = *running_;
  Warp& warp = warps_[self.warp];
  const unsigned bit = 1u << self.lane;
  if ((mask & bit) == 0) fault(join(operation, " at ", describe(site), " has a mask without this lane, ", hex(mask)));
  if ((mask & ~warp.alive) != 0) {
    fault(join(operation, " at ", describe(site), " waits for lane ", std::countr_zero(mask & ~warp.alive),
               ", which has exited or is not there; its mask is ", hex(mask)));
  }
  size_t at = 0;
  while (at < warp.meetings.size() && (warp.meetings[at].mask & mask) == 0) ++at;
  if (at == warp.meetings.size()) {
    warp.meetings.push_back({mask, 0, operation, site, static_cast<size_t>(&self - threads_.data()), {}});
  }
  Meeting& meeting = warp.meetings[at];
  if (meeting.mask != mask || !same(meeting.site, site) || !same(meeting.operation, operation)) {
    fault(join("is in ", operation, " at ", describe(site), " with mask ", hex(mask), " while ",
               name(threads_[meeting.first]), " is in ", meeting.operation, " at ", describe(meeting.site),
               " with mask ", hex(meeting.mask)));
  }
  meeting.arrived |= bit;
  meeting.payloads[self.lane] = payload;
  self.operation = operation;
  self.site = site;
  if (meeting.arrived != mask) {
    self.state = Thread::State::kCollective;
    pause();
    return;
  }
  if (resolve != nullptr) resolve(meeting.payloads, mask);
  warp.meetings.erase(warp.meetings.begin() + static_cast<ptrdiff_t>(at));
  for (unsigned others = mask & ~bit; others != 0; others &= others - 1) {
    release(threads_[self.warp * kLanes + static_cast<size_t>(std::countr_zero(others))]);
  }
}

bool Block::barrier(const char* operation, const Site& site, bool predicate) {
  Thread& self = *running_;
  if (live_ != threads_.size()) {
    for (const Thread& thread : threads_) {
      if (thread.state == Thread::State::kExited) {
        fault(join("waits in ", operation, " at ", describe(site), " for ", name(thread), ", which has exited"));
      }
    }
  }
  if (at_barrier_ == 0) {
    first_at_barrier_ = static_cast<size_t>(&self - threads_.data());
    predicate_ = false;
  } else if (const Thread& first = threads_[first_at_barrier_];
             !same(first.site, site) || !same(first.operation, operation)) {
    fault(join("is in ", operation, " at ", describe(site), " while ", name(first), " is in ", first.operation, " at ",
               describe(first.site)));
  }
  predicate_ |= predicate;
  self.operation = operation;
  self.site = site;
  if (++at_barrier_ < threads_.size()) {
    self.state = Thread::State::kBarrier;
    pause();
    return any_;
  }
  at_barrier_ = 0;
  any_ = predicate_;  // stands until all threads have come to the next one
  for (Thread& thread : threads_) {
    if (&thread != &self) release(thread);
  }
  return any_;
}

void Block::fault(const std::string& what) {
  error_ = join(where(), ", ", name(*running_), ": ", what);
  switch_context(running_->context, scheduler_, true);
  __builtin_unreachable();
}

std::string Block::name(const Thread& thread) const {
  return join("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ')');
}

std::string Block::where() const {
  return join("kernel launched at ", describe(launch_->where), ", block (", blockIdx.x, ", ", blockIdx.y, ", ",
              blockIdx.z, ')');
}

void Block::check_guards() const {
  const size_t begin = shared_offset_, end = shared_offset_ + launch_->shared_bytes;
  for (size_t i = 0; i < shared_.size(); ++i) {
    if (i == begin) i = end;
    if (shared_[i] != kPoison) {
      throw fastserve::Error(join(where(), ": shared memory of ", launch_->shared_bytes,
                                  " bytes was written out of bounds, at byte ",
                                  static_cast<ptrdiff_t>(i) - static_cast<ptrdiff_t>(begin)));
    }
  }
}

void Block::report_deadlock() const {
  std::string text = where() + ": no thread can go on";
  // One of each kind is enough to see what is wrong.
  for (const auto state : {Thread::State::kCollective, Thread::State::kBarrier}) {
    for (const Thread& thread : threads_) {
      if (thread.state != state) continue;
      text += join("; ", name(thread), " waits in ", thread.operation, " at ", describe(thread.site));
      if (state == Thread::State::kCollective) {
        for (const Meeting& meeting : warps_[thread.warp].meetings) {
          if ((meeting.mask >> thread.lane & 1u) == 0) continue;
          const int missing = std::countr_zero(meeting.mask & ~meeting.arrived);
          text += join(" for ", name(threads_[thread.warp * kLanes + static_cast<size_t>(missing)]));
        }
      }
      break;
    }
  }
  throw fastserve::Error(text);
}

}  // namespace simt
