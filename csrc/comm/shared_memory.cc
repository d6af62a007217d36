#include "comm/shared_memory.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>

#include "comm/futex.h"
#include "comm/shared_joining.h"
#include "comm/shared_layout.h"
#include "common/check.h"
#include "common/pause.h"

namespace fastserve {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr int64_t kWholeBytes = 32 << 10;  // up to here every rank sums everything itself, and meets the others once
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr auto kLookTime = std::chrono::milliseconds(100);  // between looks after the others, while parked
constexpr auto kSoon = std::chrono::microseconds(50);       // between turns while other messages have to be moved
constexpr int kSpinsPerClockRead = 64;

class SharedMemory final : public Communicator {
 public:
  SharedMemory(std::unique_ptr<Segment> segment, int rank, std::vector<Member> members, Patience patience);
  const char* kind() const override { return "shared memory"; }

 private:
  void do_all_reduce_sum(std::span<float> values) override;
  void do_all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> offsets) override;
  void do_broadcast(Bytes data, int root) override;
  void do_barrier() override;
  Request do_send(ConstBytes data, int to) override;
  Request do_receive(Bytes data, int from) override;
  bool do_test(Message& message) override;
  bool do_wait_until(Message& message, TimePoint until) override;
  bool do_advance() override { return progress(), open_ > 0; }
  void do_look() override {
    check_aborted();
    check_others();
  }
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    return share_memory(*this, ranks_of(color, key));
  }
  void do_abort(const std::string& reason) override;
  void do_close() override;

  // Collectives are made of rounds. In a round a rank may fill its slot, then it arrives, then it may read the slots of
  // ranks that have arrived. Slots take turns by the round's parity: one is filled again two rounds later, when all
  // have arrived in the round between, and so are done with reading it.
  void open_round(Call call, int64_t bytes);
  void arrive();
  void await(int peer);
  void await_all();
  std::byte* slot(int rank, uint64_t round) const { return segment_->data() + layout_.slot(rank, round); }
  void reduce(std::span<float> part);

  // Moves what can be moved of the messages that were begun.
  void progress();

  template <class Ready>
  bool wait_for(int peer, Ready&& ready, TimePoint until = kForever);
  bool look_after(int peer, Clock::time_point begin);
  void check_others() const;
  void check_aborted() const;
  void ring(int peer);

  SharedHeader& header() const { return at<SharedHeader>(0); }
  Desk& desk(int rank) const { return at<Desk>(layout_.desk(rank)); }
  Ring& ring_from(int from, int to) const { return at<Ring>(layout_.ring(from, to)); }
  template <class T>
  T& at(int64_t offset) const {
    return *reinterpret_cast<T*>(segment_->data() + offset);
  }

  const std::unique_ptr<Segment> segment_;
  const SharedLayout layout_;
  bool crowded_;  // more ranks than cores: who waits had better not spin
  uint64_t round_ = 0;
  std::vector<std::deque<std::shared_ptr<Transfer>>> sends_, receives_;  // by peer, oldest first
  int64_t open_ = 0;                                                     // messages in those
  TimePoint next_look_ = Clock::now() + kLookTime;  // of any wait: short ones, too, must find out in the end
};

SharedMemory::SharedMemory(std::unique_ptr<Segment> segment, int rank, std::vector<Member> members, Patience patience)
    : Communicator(rank, std::move(members), std::move(patience)),
      segment_(std::move(segment)),
      layout_{size()},
      sends_(size()),
      receives_(size()) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  for (int r = 0; r < size(); ++r) CPU_OR(&cores, &cores, &desk(r).cores);
  crowded_ = size() > CPU_COUNT(&cores);
}

void SharedMemory::check_aborted() const {
  if (header().aborted.load(std::memory_order_acquire) == kYes) throw Error(header().reason);
}

void SharedMemory::ring(int peer) {
  Desk& other = desk(peer);
  // Sequentially consistent with wait_for, which says that it parks before it looks for what has just changed.
  if (other.parked.load() == 0) return;
  other.bell.fetch_add(1);
  futex_wake(other.bell);
}

void SharedMemory::check_others() const {
  for (int r = 0; r < size(); ++r) {
    if (r == rank() || segment_->held(r)) continue;
    FS_CHECK(desk(r).state.load() == kLeft, members()[r].text(), " is gone");
  }
}

// Throws when the wait for `peer` cannot end well. Whether nothing more will come of that one.
bool SharedMemory::look_after(int peer, Clock::time_point begin) {
  check_others();
  const double seconds = Seconds(Clock::now() - begin).count();
  FS_CHECK(seconds < patience().seconds, members()[rank()].text(), " has waited ", seconds, " seconds for ",
           members()[peer].text());
  if (patience().ask) patience().ask();
  return desk(peer).state.load() == kLeft;
}

// Whether it is ready; false when the time is up.
template <class Ready>
bool SharedMemory::wait_for(int peer, Ready&& ready, TimePoint until) {
  if (ready()) return true;
  const auto begin = Clock::now();
  const auto spin_until = std::min(begin + kSpinTime, until);
  while (!crowded_ && Clock::now() < spin_until) {
    for (int i = 0; i < kSpinsPerClockRead; ++i) {
      if (ready()) return true;
      pause();
    }
    advance_others();
  }
  Desk& own = desk(rank());
  struct Parked {
    explicit Parked(std::atomic<uint32_t>& flag) : flag(flag) { flag.store(1); }
    ~Parked() { flag.store(0); }
    std::atomic<uint32_t>& flag;
  } parked(own.parked);
  for (;;) {
    const uint32_t bell = own.bell.load();
    if (ready()) return true;
    check_aborted();
    const auto now = Clock::now();
    if (now >= next_look_) {
      next_look_ = now + kLookTime;
      const bool left = look_after(peer, begin);
      if (left && ready()) return true;  // what it did last
      FS_CHECK(!left, members()[peer].text(), " has left");
    }
    if (now >= until) return false;
    const std::chrono::nanoseconds longest = advance_others() ? std::chrono::nanoseconds(kSoon) : kLookTime;
    futex_wait(own.bell, bell, std::min(longest, until - now));
  }
}

void SharedMemory::open_round(Call call, int64_t bytes) {
  check_aborted();
  ++round_;
  for (int r = 0; r < size(); ++r) {
    wait_for(r, [&] { return progress(), desk(r).arrived.load(std::memory_order_acquire) + 1 >= round_; });
  }
  const uint64_t word = static_cast<uint64_t>(call) << 56 | static_cast<uint64_t>(bytes);
  desk(rank()).calls[round_ % 2].store(word, std::memory_order_relaxed);
}

void SharedMemory::arrive() {
  desk(rank()).arrived.store(round_);
  for (int r = 0; r < size(); ++r) {
    if (r != rank()) ring(r);
  }
}

void SharedMemory::await(int peer) {
  wait_for(peer, [&] { return progress(), desk(peer).arrived.load(std::memory_order_acquire) >= round_; });
  const uint64_t theirs = desk(peer).calls[round_ % 2].load(std::memory_order_relaxed);
  const uint64_t mine = desk(rank()).calls[round_ % 2].load(std::memory_order_relaxed);
  if (theirs == mine) return;
  const auto text = [](uint64_t word) {
    static constexpr const char* kNames[] = {"nothing", "all_reduce", "all_gather", "broadcast", "barrier"};
    return std::string(kNames[word >> 56]) + " of " + std::to_string(word << 8 >> 8) + " bytes";
  };
  FS_CHECK(false, members()[peer].text(), " calls ", text(theirs), " where ", members()[rank()].text(), " calls ",
           text(mine));
}

void SharedMemory::await_all() {
  for (int r = 0; r < size(); ++r) {
    if (r != rank()) await(r);
  }
}

void SharedMemory::do_all_reduce_sum(std::span<float> values) {
  constexpr size_t kChunk = kSlotBytes / sizeof(float);
  size_t begin = 0;
  do {
    reduce(values.subspan(begin, std::min(kChunk, values.size() - begin)));
    begin += kChunk;
  } while (begin < values.size());
}

void SharedMemory::reduce(std::span<float> part) {
  const auto bytes = static_cast<int64_t>(part.size_bytes()), count = static_cast<int64_t>(part.size());
  const auto floats = [&](int rank, uint64_t round) { return reinterpret_cast<float*>(slot(rank, round)); };
  open_round(Call::kReduce, bytes);
  std::copy(part.begin(), part.end(), floats(rank(), round_));
  arrive();
  await_all();
  const bool whole = size() == 2 || bytes <= kWholeBytes;
  const int64_t begin = whole ? 0 : slice_begin(count, rank(), size());
  const int64_t end = whole ? count : slice_begin(count, rank() + 1, size());
  std::vector<const float*> contributions(size());
  for (int r = 0; r < size(); ++r) contributions[r] = floats(r, round_) + begin;
  if (whole) return sum_in_order(contributions, count, part.data());

  open_round(Call::kReduce, bytes);
  sum_in_order(contributions, end - begin, floats(rank(), round_) + begin);
  arrive();
  for (int step = 0; step < size(); ++step) {
    const int r = (rank() + step) % size();
    if (r != rank()) await(r);
    std::copy(floats(r, round_) + slice_begin(count, r, size()), floats(r, round_) + slice_begin(count, r + 1, size()),
              part.begin() + slice_begin(count, r, size()));
  }
}

void SharedMemory::do_all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> offsets) {
  int64_t longest = 0;
  for (int r = 0; r < size(); ++r) longest = std::max(longest, offsets[r + 1] - offsets[r]);
  int64_t begin = 0;
  do {
    const auto chunk = [&](int r) { return std::clamp<int64_t>(offsets[r + 1] - offsets[r] - begin, 0, kSlotBytes); };
    open_round(Call::kGather, offsets.back());
    std::copy_n(mine.begin() + std::min<int64_t>(begin, mine.size()), chunk(rank()), slot(rank(), round_));
    arrive();
    for (int step = 0; step < size(); ++step) {
      const int r = (rank() + step) % size();
      if (r != rank()) await(r);
      if (chunk(r) > 0) std::copy_n(slot(r, round_), chunk(r), all.begin() + offsets[r] + begin);
    }
    begin += kSlotBytes;
  } while (begin < longest);
}

void SharedMemory::do_broadcast(Bytes data, int root) {
  size_t begin = 0;
  do {
    const Bytes part = data.subspan(begin, std::min<size_t>(kSlotBytes, data.size() - begin));
    open_round(Call::kBroadcast, static_cast<int64_t>(data.size()));
    if (rank() == root) std::copy(part.begin(), part.end(), slot(root, round_));
    arrive();
    if (rank() != root) {
      await(root);
      std::copy_n(slot(root, round_), part.size(), part.begin());
    }
    begin += kSlotBytes;
  } while (begin < data.size());
}

void SharedMemory::do_barrier() {
  open_round(Call::kBarrier, 0);
  arrive();
  await_all();
}

Request SharedMemory::do_send(ConstBytes data, int to) {
  check_aborted();
  auto message = std::make_shared<Transfer>(to, const_cast<std::byte*>(data.data()), static_cast<int64_t>(data.size()));
  sends_[to].push_back(message);
  ++open_;
  progress();
  return message;
}

Request SharedMemory::do_receive(Bytes data, int from) {
  check_aborted();
  auto message = std::make_shared<Transfer>(from, data.data(), static_cast<int64_t>(data.size()));
  receives_[from].push_back(message);
  ++open_;
  progress();
  return message;
}

bool SharedMemory::do_test(Message& message) {
  check_aborted();
  progress();
  return message.done;
}

bool SharedMemory::do_wait_until(Message& message, TimePoint until) {
  check_aborted();
  return wait_for(message.peer, [&] { return progress(), message.done; }, until);
}

void SharedMemory::progress() {
  if (open_ == 0) return;
  const auto advance = [this](std::deque<std::shared_ptr<Transfer>>& queue, auto& move, Ring& ring_of_both) {
    while (!queue.empty()) {
      Transfer& message = *queue.front();
      const Moved moved = move(ring_of_both, message);
      FS_CHECK(message.announced < 0 || message.announced == message.size, members()[message.peer].text(), " sends ",
               message.announced, " bytes where ", members()[rank()].text(), " receives ", message.size);
      if (moved != Moved::kNothing) ring(message.peer);
      if (moved != Moved::kAll) return;
      message.done = true;
      queue.pop_front();
      --open_;
    }
  };
  for (int r = 0; r < size(); ++r) {
    advance(sends_[r], push, ring_from(rank(), r));
    advance(receives_[r], pull, ring_from(r, rank()));
  }
}

void SharedMemory::do_abort(const std::string& reason) { abort_all(*segment_, layout_, reason); }

void SharedMemory::do_close() {
  FS_CHECK(open_ == 0 || header().aborted.load() != kNo, members()[rank()].text(), " closes a communicator with ",
           open_, " open messages");
  desk(rank()).state.store(kLeft);
  for (int r = 0; r < size(); ++r) {
    if (r != rank()) ring(r);
  }
}

}  // namespace

std::unique_ptr<SegmentFile> make_shared_memory(int size) {
  FS_CHECK(size >= 1 && size <= kMaxSharedRanks, "between 1 and ", kMaxSharedRanks, " ranks can share memory, not ",
           size);
  return std::make_unique<SegmentFile>(SharedLayout{size}.bytes());
}

void abort_shared_memory(const std::string& path, int size, const std::string& reason) {
  const SharedLayout layout{size};
  Segment segment(path, layout.bytes());
  abort_all(segment, layout, reason);
}

std::unique_ptr<Communicator> join_shared_memory(const std::string& path, int rank, int size, const Member& self,
                                                 Patience patience) {
  FS_CHECK(size >= 1 && size <= kMaxSharedRanks && rank >= 0 && rank < size, "there is no rank ", rank, " of ", size,
           " that can share memory");
  Joined joined = join_segment(path, rank, size, self, patience);
  return std::make_unique<SharedMemory>(std::move(joined.segment), rank, std::move(joined.members),
                                        std::move(patience));
}

std::unique_ptr<Communicator> share_memory(Communicator& parent, std::span<const int> ranks) {
  struct Path {
    char text[64];
  };
  Path path = {};
  std::unique_ptr<SegmentFile> file;
  if (!ranks.empty() && ranks.front() == parent.rank()) {
    file = make_shared_memory(static_cast<int>(ranks.size()));
    file->path().copy(path.text, sizeof path.text - 1);
  }
  std::vector<Path> paths(parent.size());
  parent.all_gather(std::as_bytes(std::span(&path, 1)), std::as_writable_bytes(std::span(paths)));
  const auto self = std::find(ranks.begin(), ranks.end(), parent.rank());
  if (self == ranks.end()) return nullptr;
  return join_shared_memory(paths[ranks.front()].text, static_cast<int>(self - ranks.begin()),
                            static_cast<int>(ranks.size()), parent.members()[parent.rank()], parent.patience());
}

}  // namespace fastserve
