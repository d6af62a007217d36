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
constexpr uint64_t kMostHeldRounds = 40;

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
  count_ = size_t{launch.block.x} * launch.block.y * launch.block.z;
  launch_ = &launch;
  body_ = &body;
  random_ = Random(seed);
  error_.clear();
  exception_ = nullptr;
  blockDim = launch.block;
  gridDim = launch.grid;
  const size_t warps = (count_ + kLanes - 1) / kLanes;  // of a block
  members_.resize(launch.cluster);
  threads_.resize(launch.cluster * count_);
  warps_.resize(launch.cluster * warps);
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    for (size_t i = 0; i < count_; ++i) {
      const auto linear = static_cast<unsigned>(i);
      Thread& thread = threads_[rank * count_ + i];
      thread.index = {linear % launch.block.x, linear / launch.block.x % launch.block.y,
                      linear / launch.block.x / launch.block.y};
      thread.rank = rank;
      thread.warp = rank * warps + i / kLanes;
      thread.lane = static_cast<int>(i % kLanes);
      if (thread.lane == 0) warps_[thread.warp].first = rank * count_ + i;
    }
    Member& member = members_[rank];
    member.shared.resize(launch.shared_bytes + 2 * kGuard + 128);
    const auto begin = reinterpret_cast<uintptr_t>(member.shared.data()) + kGuard;
    member.shared_offset = (begin + 127) / 128 * 128 - reinterpret_cast<uintptr_t>(member.shared.data());
  }
}

void Block::run(uint3 index) {
  blockIdx = index;
  ready_.clear();
  for (Member& member : members_) {
    std::memset(member.shared.data(), kPoison, member.shared.size());
    member.live = count_;
    member.gate = {};
  }
  cluster_gate_ = {};
  held_rounds_ = 0;
  transfers_.clear();
  for (Warp& warp : warps_) {
    warp.late = random_.next() % 4 == 0;
    warp.alive = 0;
    warp.meetings.clear();
    warp.products.clear();
  }
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.block = {index.x + thread.rank, index.y, index.z};
    thread.next_let = thread.begun = false;
    thread.state = Thread::State::kReady;
    thread.copies.clear();
    thread.copy_groups.clear();
    warps_[thread.warp].alive |= 1u << thread.lane;
    prepare(thread.context, stacks_.bottom(i), i, thread_main);
    ready_.push_back(i);
  }
  live_ = threads_.size();
  while (live_ > 0) {
    // Copies arrive at any time, and late rather than early.
    if ((ready_.empty() || random_.next() % 4 == 0) && transfers_.any()) transfers_.finish_one(random_.next());
    if (ready_.empty()) {
      if (!transfers_.any()) report_deadlock();
      continue;
    }
    round_.swap(ready_);
    ready_.clear();
    hold_a_member();
    random_.shuffle(round_);
    hold_back_late();
    for (const size_t i : round_) {
      running_ = &threads_[i];
      threadIdx = running_->index;
      blockIdx = running_->block;
      switch_context(scheduler_, running_->context);
      running_ = nullptr;
      if (exception_) std::rethrow_exception(exception_);
      if (!error_.empty()) throw fastserve::Error(error_);
    }
  }
  if (transfers_.any()) throw fastserve::Error(where() + ": has ended before a copy into its shared memory");
  check_guards();
}

// Blocks of a cluster do not keep step: now and then one of them stands still while the others go as far as they can.
void Block::hold_a_member() {
  if (members_.size() == 1) return;
  if (held_rounds_ == 0) {
    held_ = static_cast<unsigned>(random_.next() % (2 * members_.size()));  // often none
    held_rounds_ = 1 + random_.next() % kMostHeldRounds;
  }
  --held_rounds_;
  const auto first = std::partition(round_.begin(), round_.end(), [&](size_t i) { return threads_[i].rank != held_; });
  if (first == round_.begin()) {  // nobody else can go on
    held_rounds_ = 0;
    return;
  }
  ready_.assign(first, round_.end());
  round_.erase(first, round_.end());
}

// A GPU's warps are not as fair as rounds are: one may be at a barrier before another has begun.
void Block::hold_back_late() {
  const auto is_late = [&](size_t i) { return warps_[threads_[i].warp].late; };
  const auto late = std::partition(round_.begin(), round_.end(), std::not_fn(is_late));
  if (late == round_.begin()) return;
  ready_.insert(ready_.end(), late, round_.end());
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
  for (const Gate* gate : {&members_[thread.rank].gate, &cluster_gate_}) {
    if (gate->arrived == 0) continue;
    const Thread& first = threads_[gate->first];
    fault(join("has exited, but ", name(first), " waits for it in ", first.operation, " at ", describe(first.site)));
  }
  if (launch_->early && !thread.begun) {
    fault("has exited without wait_for_predecessor, in a kernel that begins early");
  }
  if (!warps_[thread.warp].products.done()) fault("has exited before products that it began were done");
  thread.state = Thread::State::kExited;
  warps_[thread.warp].alive &= ~(1u << thread.lane);
  --members_[thread.rank].live;
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
    release(threads_[warp.first + static_cast<size_t>(std::countr_zero(others))]);
  }
}

// Of the threads from `first` on.
void Block::pass(Gate& gate, size_t threads, size_t first, const char* operation, const Site& site) {
  Thread& self = *running_;
  for (size_t i = first; i < first + threads; ++i) {
    if (threads_[i].state == Thread::State::kExited) {
      fault(join("waits in ", operation, " at ", describe(site), " for ", name(threads_[i]), ", which has exited"));
    }
  }
  if (gate.arrived == 0) {
    gate.first = static_cast<size_t>(&self - threads_.data());
  } else if (const Thread& came = threads_[gate.first]; !same(came.site, site) || !same(came.operation, operation)) {
    fault(join("is in ", operation, " at ", describe(site), " while ", name(came), " is in ", came.operation, " at ",
               describe(came.site)));
  }
  self.operation = operation;
  self.site = site;
  if (++gate.arrived < threads) {
    self.state = Thread::State::kBarrier;
    pause();
    return;
  }
  gate.arrived = 0;
  gate.any = gate.predicate;  // stands until all threads have come to the next one
  gate.predicate = false;
  for (size_t i = first; i < first + threads; ++i) {
    if (&threads_[i] != &self) release(threads_[i]);
  }
}

bool Block::barrier(const char* operation, const Site& site, bool predicate) {
  Gate& gate = members_[running_->rank].gate;
  gate.predicate |= predicate;
  pass(gate, count_, running_->rank * count_, operation, site);
  return gate.any;
}

void Block::cluster_barrier(const Site& site) { pass(cluster_gate_, threads_.size(), 0, "cluster_barrier", site); }

void Block::wait_for_shared(const char* operation, const Site& site) {
  running_->operation = operation;
  running_->site = site;
  running_->state = Thread::State::kShared;
  pause();
}

void Block::fault(const std::string& what) {
  error_ = join(where(), ", ", name(*running_), ": ", what);
  switch_context(running_->context, scheduler_, true);
  __builtin_unreachable();
}

std::string Block::name(const Thread& thread) const {
  const std::string name = join("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ')');
  return members_.size() == 1 ? name : join(name, " of block ", thread.block.x);
}

std::string Block::where() const {
  return join("kernel launched at ", describe(launch_->where), ", block (", blockIdx.x, ", ", blockIdx.y, ", ",
              blockIdx.z, ')');
}

void Block::check_guards() const {
  for (const Member& member : members_) {
    const size_t begin = member.shared_offset, end = begin + launch_->shared_bytes;
    for (size_t i = 0; i < member.shared.size(); ++i) {
      if (i == begin) i = end;
      if (member.shared[i] != kPoison) {
        throw fastserve::Error(join(where(), ": shared memory of ", launch_->shared_bytes,
                                    " bytes was written out of bounds, at byte ",
                                    static_cast<ptrdiff_t>(i) - static_cast<ptrdiff_t>(begin)));
      }
    }
  }
}

void Block::report_deadlock() const {
  std::string text = where() + ": no thread can go on";
  // One of each kind is enough to see what is wrong.
  for (const auto state : {Thread::State::kCollective, Thread::State::kBarrier, Thread::State::kShared}) {
    for (const Thread& thread : threads_) {
      if (thread.state != state) continue;
      text += join("; ", name(thread), " waits in ", thread.operation, " at ", describe(thread.site));
      if (state == Thread::State::kCollective) {
        for (const Meeting& meeting : warps_[thread.warp].meetings) {
          if ((meeting.mask >> thread.lane & 1u) == 0) continue;
          const int missing = std::countr_zero(meeting.mask & ~meeting.arrived);
          text += join(" for ", name(threads_[warps_[thread.warp].first + static_cast<size_t>(missing)]));
        }
      }
      break;
    }
  }
  throw fastserve::Error(text);
}

}  // namespace simt
