// The plugin _mpi: messages over MPI. Collectives are those that communicator.cc makes of messages, because a wait for
// a message can say whom it is for.
#include "comm/mpi.h"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "comm/mpi_memory.h"
#include "common/check.h"
#include "common/pause.h"

namespace fastserve {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr auto kShortestSleep = std::chrono::microseconds(10);
constexpr auto kLongestSleep = std::chrono::microseconds(1000);
constexpr auto kLookTime = std::chrono::milliseconds(100);
constexpr int64_t kPieceBytes = 1 << 30;  // MPI counts in int
constexpr int kDataTag = 1, kAbortTag = 2;

void check(int status, const char* what) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(status, text, &length);
  FS_CHECK(false, "MPI, ", what, ": ", text);
}

// This process's MPI, shared by its communicators: set up once, and ended with the process if all of them were closed.
// (To end it while others wait for this rank would be to wait with them.)
class World {
 public:
  // `alarm`: of the first call, while MPI begins.
  static World& get(int alarm = -1) {
    static World* world = new World(alarm);  // used until the process ends
    return *world;
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool aborted() const { return aborted_; }
  void opened() { ++open_; }
  void closed() { --open_; }

  // Tells every rank once, and marks this one.
  void abort(const std::string& reason) {
    std::lock_guard lock(mutex_);
    if (aborted_) return;
    mark(reason);
    for (int r = 0; r < size_; ++r) {
      MPI_Request request;
      if (r != rank_ && MPI_Isend(reason_.data(), kReasonBytes, MPI_CHAR, r, kAbortTag, news_, &request) == MPI_SUCCESS)
        telling_.push_back(request);
    }
    int all = 0;
    for (const auto end = Clock::now() + kLookTime; all == 0 && Clock::now() < end;) {
      MPI_Testall(static_cast<int>(telling_.size()), telling_.data(), &all, MPI_STATUSES_IGNORE);
    }
  }

  // Throws when this or another rank has given up.
  void check_aborted(bool look) {
    if (!aborted_ && look) {
      std::lock_guard lock(mutex_);
      int there = 0;
      MPI_Status status;
      check(MPI_Iprobe(MPI_ANY_SOURCE, kAbortTag, news_, &there, &status), "probe");
      if (there != 0 && !aborted_) {
        std::array<char, kReasonBytes> text = {};
        check(MPI_Recv(text.data(), kReasonBytes, MPI_CHAR, status.MPI_SOURCE, kAbortTag, news_, MPI_STATUS_IGNORE),
              "receive");
        mark(text.data());
      }
    }
    if (aborted_) throw Error(reason_.data());
  }

 private:
  static constexpr int kReasonBytes = 1024;

  explicit World(int alarm) {
    int initialized = 0, finalized = 0, level = 0;
    check(MPI_Finalized(&finalized), "look whether it has ended");
    FS_CHECK(finalized == 0, "MPI has been ended in this process, and begins only once");
    check(MPI_Initialized(&initialized), "look whether it has begun");
    if (initialized != 0) {
      check(MPI_Query_thread(&level), "query threads");
    } else {
      RoomWatch watch(alarm);
      check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &level), "begin");
      std::atexit([] {
        if (!get().aborted_ && get().open_ == 0) MPI_Finalize();
      });
    }
    FS_CHECK(level >= MPI_THREAD_MULTIPLE, "MPI has to allow calls of several threads (MPI_THREAD_MULTIPLE)");
    check(MPI_Comm_dup(MPI_COMM_WORLD, &news_), "duplicate the world");
    check(MPI_Comm_set_errhandler(news_, MPI_ERRORS_RETURN), "set errors");
    check(MPI_Comm_rank(news_, &rank_), "rank");
    check(MPI_Comm_size(news_, &size_), "size");
  }

  void mark(const std::string& reason) {
    reason.copy(reason_.data(), kReasonBytes - 1);
    aborted_ = true;
  }

  MPI_Comm news_ = MPI_COMM_NULL;  // that a rank has given up
  int rank_ = 0, size_ = 0;
  std::atomic<int> open_ = 0;
  std::atomic<bool> aborted_ = false;
  std::mutex mutex_;
  std::array<char, kReasonBytes> reason_ = {};
  std::vector<MPI_Request> telling_;
};

struct Pieces final : Message {
  Pieces(int peer, bool received) : Message(peer), received(received) {}
  ~Pieces() override {
    for (MPI_Request& request : requests) {
      if (request != MPI_REQUEST_NULL) MPI_Cancel(&request);  // after an error only
    }
  }
  const bool received;
  std::vector<MPI_Request> requests;
  std::vector<int> lengths;
};

class Mpi final : public Communicator {
 public:
  Mpi(MPI_Comm comm, int rank, std::vector<Member> members, const Patience& patience)
      : Communicator(rank, std::move(members), patience), comm_(comm) {
    World::get().opened();
  }
  ~Mpi() override {
    if (comm_ != MPI_COMM_NULL) World::get().abort(members()[rank()].text() + " is gone");
  }
  const char* kind() const override { return "MPI"; }

 private:
  Request do_send(ConstBytes data, int to) override {
    return begin(data.size(), std::make_shared<Pieces>(to, false),
                 [&](int64_t offset, int count, MPI_Request* request) {
                   return MPI_Isend(data.data() + offset, count, MPI_BYTE, to, kDataTag, comm_, request);
                 });
  }
  Request do_receive(Bytes data, int from) override {
    return begin(data.size(), std::make_shared<Pieces>(from, true),
                 [&](int64_t offset, int count, MPI_Request* request) {
                   return MPI_Irecv(data.data() + offset, count, MPI_BYTE, from, kDataTag, comm_, request);
                 });
  }

  template <class Begin>
  Request begin(size_t size, std::shared_ptr<Pieces> message, Begin&& begin) {
    World::get().check_aborted(false);
    int64_t offset = 0;
    do {
      const auto count = static_cast<int>(std::min<int64_t>(kPieceBytes, static_cast<int64_t>(size) - offset));
      message->requests.push_back(MPI_REQUEST_NULL);
      message->lengths.push_back(count);
      check(begin(offset, count, &message->requests.back()), members()[message->peer].text().c_str());
      offset += count;
    } while (offset < static_cast<int64_t>(size));
    ++open_;
    return message;
  }

  bool do_test(Message& message) override {
    World::get().check_aborted(false);
    auto& pieces = static_cast<Pieces&>(message);
    for (size_t i = 0; i < pieces.requests.size(); ++i) {
      if (pieces.requests[i] == MPI_REQUEST_NULL) continue;
      int done = 0, count = 0;
      MPI_Status status;
      check(MPI_Test(&pieces.requests[i], &done, &status), members()[message.peer].text().c_str());
      if (done == 0) return false;
      if (!pieces.received) continue;
      check(MPI_Get_count(&status, MPI_BYTE, &count), "count");
      FS_CHECK(count == pieces.lengths[i], members()[message.peer].text(), " sends ", count, " bytes where ",
               members()[rank()].text(), " receives ", pieces.lengths[i]);
    }
    --open_;
    return message.done = true;
  }

  // MPI moves all messages in any call.
  bool do_advance() override {
    int there = 0;
    check(MPI_Iprobe(MPI_ANY_SOURCE, kDataTag, comm_, &there, MPI_STATUS_IGNORE), "probe");
    return open_ > 0;
  }

  void do_look() override { World::get().check_aborted(true); }

  bool do_wait_until(Message& message, TimePoint until) override {
    const auto begin = Clock::now();
    const auto spin_until = std::min(begin + kSpinTime, until);
    while (Clock::now() < spin_until) {
      if (do_test(message)) return true;
      pause();
    }
    for (auto sleep = kShortestSleep; !do_test(message); sleep = std::min(sleep * 2, kLongestSleep)) {
      const auto now = Clock::now();
      if (now < next_look_) {
        if (now >= until) return false;
        std::this_thread::sleep_for(advance_others() ? kShortestSleep : sleep);
        continue;
      }
      next_look_ = now + kLookTime;
      World::get().check_aborted(true);
      const double seconds = Seconds(Clock::now() - begin).count();
      FS_CHECK(seconds < patience().seconds, members()[rank()].text(), " has waited ", seconds, " seconds for ",
               members()[message.peer].text());
      if (patience().ask) patience().ask();
    }
    return true;
  }

  std::unique_ptr<Communicator> do_split(int color, int key) override {
    const std::vector<int> ranks = ranks_of(color, key);
    std::vector<Member> chosen;
    for (const int r : ranks) chosen.push_back(members()[r]);
    MPI_Comm comm = MPI_COMM_NULL;
    check(MPI_Comm_split(comm_, color < 0 ? MPI_UNDEFINED : color, key, &comm), "split");
    if (comm == MPI_COMM_NULL) return nullptr;
    check(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "set errors");
    const auto self = std::find(ranks.begin(), ranks.end(), rank());
    return std::make_unique<Mpi>(comm, static_cast<int>(self - ranks.begin()), std::move(chosen), patience());
  }

  void do_abort(const std::string& reason) override { World::get().abort(reason); }

  void do_close() override {
    if (!World::get().aborted()) check(MPI_Comm_free(&comm_), "free");
    comm_ = MPI_COMM_NULL;
    World::get().closed();
  }

  MPI_Comm comm_;
  int64_t open_ = 0;                                        // messages
  Clock::time_point next_look_ = Clock::now() + kLookTime;  // of any wait: short ones, too, must find out in the end
};

}  // namespace

extern "C" __attribute__((visibility("default"))) Communicator* fastserve_connect_mpi(const std::string& host,
                                                                                      const Patience& patience,
                                                                                      int alarm) {
  World& world = World::get(alarm);
  // Everybody learns where everybody is, over a communicator whose members know only their ranks.
  std::vector<Member> members;
  for (int r = 0; r < world.size(); ++r) members.push_back({.world_rank = r, .process = 0, .machine = 0, .host = "?"});
  const Member self = members[world.rank()] = this_member(world.rank(), host);
  const auto duplicate = [] {
    MPI_Comm comm = MPI_COMM_NULL;
    check(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "duplicate the world");
    check(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "set errors");
    return comm;
  };
  Mpi unknown(duplicate(), world.rank(), members, patience);
  unknown.all_gather(std::as_bytes(std::span(&self, 1)), std::as_writable_bytes(std::span(members)));
  unknown.barrier();  // each has heard of each, so all have mapped what they share
  unlink_mpi_memory();
  unknown.close();
  return new Mpi(duplicate(), world.rank(), std::move(members), patience);
}

}  // namespace fastserve
