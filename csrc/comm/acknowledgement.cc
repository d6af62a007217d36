#include "comm/acknowledgement.h"

#include <algorithm>
#include <array>

#include "common/check.h"

namespace fastserve {

namespace {

struct WireCopy {
  int32_t copy;
  float seconds;
};

using Head = Acknowledgements::Head;
static_assert(sizeof(Head) == 24 && sizeof(WireCopy) == 8);

std::span<std::byte> bytes_of(auto& values) { return std::as_writable_bytes(std::span(values)); }

Acknowledgement receive_rest(Communicator& communicator, int rank, const Head& head) {
  Acknowledgement result{head.plan_id, head.seconds, {}};
  std::vector<WireCopy> copies(head.copies);
  if (head.copies > 0) communicator.wait(*communicator.receive(bytes_of(copies), rank));
  for (const WireCopy& copy : copies) result.copies.push_back({copy.copy, copy.seconds});
  return result;
}

}  // namespace

void send_acknowledgement(Communicator& communicator, const Acknowledgement& own) {
  std::vector<WireCopy> copies;
  for (const FinishedCopy& copy : own.copies) copies.push_back({copy.copy, static_cast<float>(copy.seconds)});
  std::array<Head, 1> head{{{.plan_id = own.plan_id, .seconds = own.seconds, .copies = copies.size()}}};
  std::vector<Request> requests{communicator.send(bytes_of(head), 0)};
  if (!copies.empty()) requests.push_back(communicator.send(bytes_of(copies), 0));
  for (const Request& request : requests) communicator.wait(*request);
}

std::optional<Acknowledgement> Acknowledgements::gather(Communicator& communicator, const Acknowledgement& own,
                                                        TimePoint until) {
  const int size = communicator.size();
  if (requests_.empty()) {
    heads_.assign(size, {});
    for (int r = 1; r < size; ++r) {
      requests_.push_back(communicator.receive(std::as_writable_bytes(std::span(&heads_[r], 1)), r));
    }
  }
  for (const Request& request : requests_) {
    if (!communicator.wait_until(*request, until)) return std::nullopt;
  }
  requests_.clear();

  std::vector<Acknowledgement> all{own};
  for (int r = 1; r < size; ++r) {
    FS_CHECK(heads_[r].plan_id == own.plan_id, communicator.members()[r].text(), " acknowledges plan ",
             heads_[r].plan_id, " where plan ", own.plan_id, " is due");
    all.push_back(receive_rest(communicator, r, heads_[r]));
  }
  Acknowledgement result{own.plan_id, 0, {}};
  for (const Acknowledgement& each : all) {
    result.seconds = std::max(result.seconds, each.seconds);
    for (const FinishedCopy& copy : each.copies) {
      Pending& pending = pending_[copy.copy];
      pending.seconds = std::max(pending.seconds, copy.seconds);
      if (++pending.ranks < size) continue;
      result.copies.push_back({copy.copy, pending.seconds});
      pending_.erase(copy.copy);
    }
  }
  return result;
}

const Member& Acknowledgements::missing(const Communicator& communicator) const {
  const auto late = std::find_if(requests_.begin(), requests_.end(), [](const Request& each) { return !each->done; });
  FS_CHECK(late != requests_.end(), "all ranks have acknowledged");
  return communicator.members()[(*late)->peer];
}

}  // namespace fastserve
