#include "comm/acknowledgement.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/check.h"

namespace fastserve {

namespace {

constexpr size_t kMostErrorBytes = 1000;

// One message of this, and then, where they are, one of copies and one of the error's text.
struct Head {
  int64_t plan_id;
  double seconds;
  uint32_t copies, error_bytes;
};

struct WireCopy {
  int32_t copy;
  float seconds;
};

static_assert(sizeof(Head) == 24 && sizeof(WireCopy) == 8);

std::span<std::byte> bytes_of(auto& values) { return std::as_writable_bytes(std::span(values)); }

Acknowledgement receive_rest(Communicator& communicator, int rank, const Head& head) {
  Acknowledgement result{head.plan_id, head.seconds, {}, {}};
  std::vector<WireCopy> copies(head.copies);
  if (head.copies > 0) communicator.wait(*communicator.receive(bytes_of(copies), rank));
  for (const WireCopy& copy : copies) result.copies.push_back({copy.copy, copy.seconds});
  result.error.resize(head.error_bytes);
  if (head.error_bytes > 0) communicator.wait(*communicator.receive(bytes_of(result.error), rank));
  return result;
}

}  // namespace

void send_acknowledgement(Communicator& communicator, const Acknowledgement& own) {
  std::string error = own.error.substr(0, kMostErrorBytes);
  std::vector<WireCopy> copies;
  for (const FinishedCopy& copy : own.copies) copies.push_back({copy.copy, static_cast<float>(copy.seconds)});
  std::array<Head, 1> head{{{.plan_id = own.plan_id,
                             .seconds = own.seconds,
                             .copies = static_cast<uint32_t>(copies.size()),
                             .error_bytes = static_cast<uint32_t>(error.size())}}};
  std::vector<Request> requests{communicator.send(bytes_of(head), 0)};
  if (!copies.empty()) requests.push_back(communicator.send(bytes_of(copies), 0));
  if (!error.empty()) requests.push_back(communicator.send(bytes_of(error), 0));
  for (const Request& request : requests) communicator.wait(*request);
}

Acknowledgement Acknowledgements::gather(Communicator& communicator, const Acknowledgement& own) {
  std::vector<Acknowledgement> all{own};
  std::vector<Head> heads(communicator.size());
  std::vector<Request> requests;
  for (int r = 1; r < communicator.size(); ++r) {
    requests.push_back(communicator.receive(std::as_writable_bytes(std::span(&heads[r], 1)), r));
  }
  for (int r = 1; r < communicator.size(); ++r) {
    communicator.wait(*requests[r - 1]);
    FS_CHECK(heads[r].error_bytes <= kMostErrorBytes, communicator.members()[r].text(), " sent no acknowledgement");
    all.push_back(receive_rest(communicator, r, heads[r]));
  }

  Acknowledgement result{own.plan_id, 0, {}, {}};
  for (int r = 0; r < communicator.size(); ++r) {
    const Member& member = communicator.members()[r];
    FS_CHECK(all[r].plan_id == own.plan_id, member.text(), " acknowledges plan ", all[r].plan_id, " where plan ",
             own.plan_id, " is due");
    FS_CHECK(all[r].error.empty(), member.text(), ": ", all[r].error);
    result.seconds = std::max(result.seconds, all[r].seconds);
    for (const FinishedCopy& copy : all[r].copies) {
      Pending& pending = pending_[copy.copy];
      pending.seconds = std::max(pending.seconds, copy.seconds);
      if (++pending.ranks < communicator.size()) continue;
      result.copies.push_back({copy.copy, pending.seconds});
      pending_.erase(copy.copy);
    }
  }
  return result;
}

}  // namespace fastserve
