#include "comm/communicator.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <numeric>

#include "common/check.h"

namespace fastserve {

std::string Member::text() const {
  return "rank " + std::to_string(world_rank) + " on " + host + " (process " + std::to_string(process) + ")";
}

Member this_member(int world_rank, const std::string& host) {
  Member member{.world_rank = world_rank, .process = getpid(), .machine = 0, .host = {}};
  if (host.empty()) {
    gethostname(member.host, sizeof member.host - 1);
  } else {
    host.copy(member.host, sizeof member.host - 1);
  }
  // One running kernel, and one view of its processes: what it takes to open each other's files under /proc.
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  struct stat processes = {};
  stat("/proc/self/ns/pid", &processes);
  member.machine = std::hash<std::string>()(boot + ' ' + std::to_string(processes.st_ino) + ' ' + member.host);
  return member;
}

std::string line_of(const std::exception_ptr& error, const Member& self) {
  std::string text = "an error of an unknown kind";
  try {
    std::rethrow_exception(error);
  } catch (const GroupError& caught) {
    return caught.what();
  } catch (const std::exception& caught) {
    text = caught.what();
  } catch (...) {  // has no text
  }
  return self.text() + ": " + text.substr(0, text.find('\n'));
}

template <class Body>
auto Communicator::guarded(Body&& body) {
  FS_CHECK(!busy_.exchange(true, std::memory_order_acquire), "two threads use one communicator at a time");
  struct Leave {
    ~Leave() { busy.store(false, std::memory_order_release); }
    std::atomic<bool>& busy;
  } leave{busy_};
  FS_CHECK(!closed_, "the communicator is closed");
  try {
    return body();
  } catch (const Error& error) {
    abort(error.what());
    throw GroupError(error.what());
  } catch (...) {  // by what Patience asked, or for want of memory
    abort(line_of(std::current_exception(), members_[rank_]));
    throw;
  }
}

void Communicator::check_peer(int peer) const {
  FS_CHECK(peer >= 0 && peer < size() && peer != rank_, "rank ", rank_, " of ", size(), " has no peer ", peer);
}

void Communicator::all_reduce_sum(std::span<float> values) {
  guarded([&] { do_all_reduce_sum(values); });
}

void Communicator::all_gather(ConstBytes mine, Bytes all) {
  all_gather(mine, all, std::vector<int64_t>(size(), static_cast<int64_t>(mine.size())));
}

void Communicator::all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> sizes) {
  FS_CHECK(static_cast<int>(sizes.size()) == size(), "all_gather takes ", size(), " sizes, got ", sizes.size());
  std::vector<int64_t> offsets(size() + 1);
  for (int r = 0; r < size(); ++r) {
    FS_CHECK(sizes[r] >= 0, "all_gather: rank ", r, " cannot give ", sizes[r], " bytes");
    offsets[r + 1] = offsets[r] + sizes[r];
  }
  FS_CHECK(static_cast<int64_t>(mine.size()) == sizes[rank_] && static_cast<int64_t>(all.size()) == offsets.back(),
           "all_gather: rank ", rank_, " gives ", mine.size(), " bytes of ", sizes[rank_], ", and ", all.size(),
           " are to hold ", offsets.back());
  guarded([&] { do_all_gather(mine, all, offsets); });
}

void Communicator::broadcast(Bytes data, int root) {
  FS_CHECK(root >= 0 && root < size(), "rank ", root, " of ", size(), " cannot broadcast");
  guarded([&] { do_broadcast(data, root); });
}

void Communicator::barrier() {
  guarded([&] { do_barrier(); });
}

Request Communicator::send(ConstBytes data, int to) {
  check_peer(to);
  return guarded([&] { return do_send(data, to); });
}

Request Communicator::receive(Bytes data, int from) {
  check_peer(from);
  return guarded([&] { return do_receive(data, from); });
}

bool Communicator::test(Message& message) {
  return message.done || guarded([&] { return do_test(message); });
}

void Communicator::wait(Message& message) { wait_until(message, kForever); }

bool Communicator::wait_until(Message& message, TimePoint until) {
  return message.done || guarded([&] { return do_wait_until(message, until); });
}

bool Communicator::advance() {
  return guarded([&] { return do_advance(); });
}

void Communicator::look(double seconds, std::span<const int> awaited) {
  guarded([&] {
    do_look();
    if (seconds >= patience_.seconds) {
      std::string others;
      for (const int r : awaited) others += (others.empty() ? "" : " or ") + members_[r].text();
      FS_CHECK(false, members_[rank_].text(), " has waited ", seconds, " seconds for ", others);
    }
    if (patience_.ask) patience_.ask();
  });
}

void Communicator::close() {
  if (closed_) return;
  guarded([&] { do_close(); });
  closed_ = true;
  if (kept_ != nullptr) kept_->close();
}

void Communicator::abort(const std::string& reason) {
  do_abort(reason);
  if (kept_ != nullptr) kept_->abort(reason);
}

std::vector<int> Communicator::ranks_of(int color, int key) {
  struct Choice {
    int32_t color, key;
  };
  const Choice mine{color, key};
  std::vector<Choice> choices(size());
  all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(choices)));
  std::vector<int> ranks;
  for (int r = 0; r < size(); ++r) {
    if (color >= 0 && choices[r].color == color) ranks.push_back(r);
  }
  std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) { return choices[a].key < choices[b].key; });
  return ranks;
}

void Communicator::do_all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> offsets) {
  std::vector<Request> requests;
  for (int step = 1; step < size(); ++step) {
    const int from = (rank_ + size() - step) % size();
    requests.push_back(do_receive(all.subspan(offsets[from], offsets[from + 1] - offsets[from]), from));
  }
  for (int step = 1; step < size(); ++step) requests.push_back(do_send(mine, (rank_ + step) % size()));
  if (!mine.empty()) std::memmove(&all[offsets[rank_]], mine.data(), mine.size());
  for (const Request& request : requests) do_wait(*request);
}

void Communicator::do_broadcast(Bytes data, int root) {
  if (rank_ != root) return do_wait(*do_receive(data, root));
  std::vector<Request> requests;
  for (int step = 1; step < size(); ++step) requests.push_back(do_send(data, (rank_ + step) % size()));
  for (const Request& request : requests) do_wait(*request);
}

void Communicator::do_all_reduce_sum(std::span<float> values) {
  std::vector<float> all(values.size() * size());
  std::vector<int64_t> offsets(size() + 1);
  for (int r = 0; r <= size(); ++r) offsets[r] = static_cast<int64_t>(values.size_bytes()) * r;
  do_all_gather(std::as_bytes(values), std::as_writable_bytes(std::span(all)), offsets);
  std::vector<const float*> contributions(size());
  for (int r = 0; r < size(); ++r) contributions[r] = all.data() + values.size() * r;
  sum_in_order(contributions, static_cast<int64_t>(values.size()), values.data());
}

void sum_in_order(std::span<const float* const> contributions, int64_t count, float* out) {
  constexpr int64_t kBlock = 1024;  // sums stay in the nearest cache while contribution after contribution comes
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = std::min(kBlock, count - begin);
    float* __restrict sum = out + begin;
    std::copy_n(contributions[0] + begin, length, sum);
    for (const float* contribution : contributions.subspan(1)) {
      const float* __restrict term = contribution + begin;
      for (int64_t i = 0; i < length; ++i) sum[i] += term[i];
    }
  }
}

}  // namespace fastserve
