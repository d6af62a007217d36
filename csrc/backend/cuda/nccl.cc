#include "backend/cuda/nccl.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "backend/cuda/kernels.h"
#include "backend/cuda/nccl_library.h"
#include "common/check.h"

namespace fastserve::cuda {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr auto kSpinTime = std::chrono::microseconds(200);
constexpr auto kNapTime = std::chrono::microseconds(100);
constexpr auto kLookTime = std::chrono::milliseconds(50);
constexpr int kLeaveSeconds = 5;
// Operations between two marks. There are fewer than ten launches to each, and a thousand fill the driver's queue.
constexpr int64_t kPace = 16;

// What ranks have to know of each other. Messages, so the layout is fixed.
struct Card {
  int32_t version;  // of the library; 0: none
  char device[16];  // which it is, of all there are
  nccl::UniqueId id;
};

template <class T>
std::span<std::byte> bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

bool set(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

// Where the library does not say when to look again.
void nap(std::chrono::nanoseconds most) {
  std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(most, kNapTime));
}

// Every rank's: all[i] is that of rank first + i.
void exchange(Communicator& ranks, int first, std::vector<Card>& all) {
  const Card mine = all[ranks.rank() - first];
  std::vector<Request> requests;
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    if (first + i == ranks.rank()) continue;
    requests.push_back(ranks.receive(bytes_of(all[i]), first + i));
    requests.push_back(ranks.send(std::as_bytes(std::span(&mine, 1)), first + i));
  }
  for (const Request& request : requests) ranks.wait(*request);
}

// Why ranks cannot do it, the same on all of them; empty: they can.
std::string obstacle(const std::vector<Card>& cards, const std::string& why_not_here) {
  if (cards.size() < 2) return "there is one rank";
  for (size_t i = 0; i < cards.size(); ++i) {
    if (cards[i].version == 0) return why_not_here.empty() ? "a rank has no NCCL" : why_not_here;
    if (cards[i].version != cards[0].version) return "ranks have different versions of NCCL";
    for (size_t j = 0; j < i; ++j) {
      if (std::memcmp(cards[i].device, cards[j].device, sizeof cards[i].device) == 0) return "ranks share a device";
    }
  }
  return {};
}

}  // namespace

class NcclCommunicator final : public DeviceCommunicator {
 public:
  NcclCommunicator(Nccl& owner, const nccl::Library& library, Communicator& ranks, int first, int size, int64_t most)
      : owner_(owner),
        library_(library),
        ranks_(ranks),
        first_(first),
        size_(size),
        parts_(Place::kDevice, static_cast<size_t>(most * size) * sizeof(float)),
        repeatable_(set("FASTSERVE_NCCL_GRAPHS")) {
    for (int r = first; r < first + size; ++r) {
      if (r != ranks.rank()) awaited_.push_back(r);
    }
    owner_.open_.push_back(this);
  }
  ~NcclCommunicator() override {
    std::erase(owner_.open_, this);
    if (comm_ != nullptr) leave();
  }
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // Begins to join, and waits until it has, or until another rank says that it cannot; whether all have.
  bool join(const nccl::UniqueId& id) {
    nccl::Config config;
    nccl::Result state = library_.join(&comm_, size_, id, ranks_.rank() - first_, &config);
    std::vector<char> joined(size_, 1);
    std::vector<Request> verdicts(size_), sent;
    const auto others = [&](auto&& body) {
      for (int i = 0; i < size_; ++i) {
        if (first_ + i != ranks_.rank()) body(i);
      }
    };
    others([&](int i) { verdicts[i] = ranks_.receive(bytes_of(joined[i]), first_ + i); });
    bool refused = false;
    owner_.wait_until(
        [&] {
          if (state == nccl::kInProgress) {
            const nccl::Result asked = library_.state(comm_, &state);
            if (asked != nccl::kSuccess) state = asked;
          }
          others([&](int i) { refused |= ranks_.test(*verdicts[i]) && joined[i] == 0; });
          return refused || state != nccl::kInProgress;
        },
        nap);
    const char mine = state == nccl::kSuccess && !refused;
    others([&](int i) { sent.push_back(ranks_.send(std::as_bytes(std::span(&mine, 1)), first_ + i)); });
    others([&](int i) { ranks_.wait(*verdicts[i]); });
    for (const Request& request : sent) ranks_.wait(*request);
    joined[ranks_.rank() - first_] = mine;
    joined_ = std::ranges::count(joined, 1) == size_;
    if (!joined_) abort();
    return joined_;
  }

  void all_reduce_sum(float* values, int64_t count) override {
    FS_CHECK(count * size_ * static_cast<int64_t>(sizeof(float)) <= static_cast<int64_t>(parts_.bytes()), "a sum of ",
             count, " values, which is more than there is room for");
    queue([&] { return library_.all_gather(values, parts_.as<void>(), count, nccl::kFloat32, comm_, owner_.stream_); });
    sum_parts(parts_.as<float>(), size_, count, values, owner_.stream_);
  }
  void send(const float* values, int64_t count, int to) override {
    queue([&] { return library_.send(values, count, nccl::kFloat32, to, comm_, owner_.stream_); });
  }
  void receive(float* values, int64_t count, int from) override {
    queue([&] { return library_.receive(values, count, nccl::kFloat32, from, comm_, owner_.stream_); });
  }
  bool repeatable() const override { return repeatable_; }

  void look(double seconds) {
    ranks_.look(seconds, awaited_);
    if (!joined_ || comm_ == nullptr) return;
    nccl::Result state = nccl::kSuccess;
    check_result(library_.state(comm_, &state));
    if (state != nccl::kInProgress) check_result(state);
  }
  // Ends what is queued.
  void abort() {
    if (comm_ != nullptr) static_cast<void>(library_.abort(std::exchange(comm_, nullptr)));
  }

 private:
  void check_result(nccl::Result result) const { FS_CHECK(result == nccl::kSuccess, "NCCL: ", library_.text(result)); }

  template <class Operation>
  void queue(Operation&& operation) {
    FS_CHECK(comm_ != nullptr, "ranks have given up exchanging between devices");
    owner_.pace();
    nccl::Result result = operation();
    owner_.wait_until(
        [&] {  // it connects to a rank when it first has to do with it
          if (result == nccl::kInProgress) check_result(library_.state(comm_, &result));
          return result != nccl::kInProgress;
        },
        nap);
    check_result(result);
  }

  // All that was queued is done here. The others may have left without a word, so their part in it is not waited for
  // long.
  void leave() {
    owner_.forget_();  // graphs hold on to it
    nccl::Result state = library_.finalize(comm_);
    const auto begin = Clock::now();
    while (state == nccl::kInProgress && Seconds(Clock::now() - begin).count() < kLeaveSeconds) {
      if (library_.state(comm_, &state) != nccl::kSuccess) break;
      nap(kLookTime);
    }
    if (state != nccl::kSuccess) return abort();
    static_cast<void>(library_.destroy(std::exchange(comm_, nullptr)));
  }

  Nccl& owner_;
  const nccl::Library library_;
  Communicator& ranks_;
  const int first_, size_;
  std::vector<int> awaited_;
  const Memory parts_;  // of a sum, every rank's
  const bool repeatable_;
  nccl::Comm comm_ = nullptr;
  bool joined_ = false;
};

std::unique_ptr<DeviceCommunicator> Nccl::connect(Communicator& ranks, int first, int count, int64_t most) {
  std::string why_not;
  const std::optional<nccl::Library> library = nccl::load(why_not);
  const int me = ranks.rank() - first;
  std::vector<Card> cards(count);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device_));
  static_assert(sizeof properties.uuid == sizeof cards[me].device);
  std::memcpy(cards[me].device, &properties.uuid, sizeof cards[me].device);
  if (library) {
    int version = 0;
    if (library->version(&version) == nccl::kSuccess && (me != 0 || library->make_id(&cards[0].id) == nccl::kSuccess)) {
      cards[me].version = version;
    } else {
      why_not = "NCCL does not work";
    }
  }
  exchange(ranks, first, cards);
  std::string reason = obstacle(cards, why_not);
  if (reason.empty()) {
    auto joined = std::make_unique<NcclCommunicator>(*this, *library, ranks, first, count, most);
    if (joined->join(cards[0].id)) return joined;
    reason = "NCCL does not connect them (NCCL_DEBUG=WARN says why)";
  }
  if (set("FASTSERVE_DEBUG")) {
    std::fprintf(stderr, "%s exchanges with others through the host's memory: %s\n",
                 ranks.members()[ranks.rank()].text().c_str(), reason.c_str());
  }
  return nullptr;
}

void Nccl::wait_until(const std::function<bool()>& ready, const Park& park) {
  const auto begin = Clock::now();
  auto next_look = begin + kLookTime;
  while (!ready()) {
    const auto now = Clock::now();
    if (now >= next_look) {
      look(Seconds(now - begin).count());
      next_look = Clock::now() + kLookTime;
    } else if (now - begin > kSpinTime) {
      park(next_look - now);
    }
  }
}

void Nccl::wait_for(const Event& event) {
  const Park park = [&](std::chrono::nanoseconds most) {
    if (!watch_.busy()) watch_.start(event, nullptr);
    watch_.wait_for(most);
  };
  try {
    wait_until([&] { return event.passed(); }, park);
  } catch (...) {
    watch_.wait_for(std::chrono::seconds(kLeaveSeconds));  // what was queued has been ended, and the event may go
    throw;
  }
  watch_.join();
}

void Nccl::look(double seconds) {
  try {
    for (NcclCommunicator* each : open_) each->look(seconds);
  } catch (...) {
    abort();
    throw;
  }
}

void Nccl::abort() noexcept {
  forget_();
  for (NcclCommunicator* each : std::exchange(open_, {})) each->abort();
}

void Nccl::pace() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status));
  if (status != cudaStreamCaptureStatusNone || ++operations_ % kPace != 0) return;
  const int64_t turn = operations_ / kPace;
  if (turn > 1) wait_for(marks_[(turn - 1) % 2]);
  marks_[turn % 2].record(stream_);
}

}  // namespace fastserve::cuda
