#include "comm/across_hosts.h"

#include <algorithm>
#include <map>

#include "comm/shared_memory.h"
#include "common/check.h"

namespace fastserve {

namespace {

struct Routed final : Message {
  Routed(int peer, Communicator& way, Request inner) : Message(peer), way(way), inner(std::move(inner)) {}
  Communicator& way;
  const Request inner;
};

// Ranks by host, hosts in the order of their first ranks.
using Hosts = std::vector<std::vector<int>>;

class AcrossHosts final : public Communicator {
 public:
  AcrossHosts(std::unique_ptr<Communicator> flat, std::unique_ptr<Communicator> local, Hosts hosts,
              std::vector<uint64_t> machines)
      : Communicator(flat->rank(), flat->members(), flat->patience()),
        flat_(std::move(flat)),
        local_(std::move(local)),
        hosts_(std::move(hosts)),
        machines_(std::move(machines)),
        host_of_(size()),
        local_rank_of_(size()) {
    local_->advance_meanwhile(*flat_);
    flat_->advance_meanwhile(*local_);
    for (size_t host = 0; host < hosts_.size(); ++host) {
      lanes_ = host == 0 ? hosts_[host].size() : std::min(lanes_, hosts_[host].size());
      for (size_t i = 0; i < hosts_[host].size(); ++i) {
        host_of_[hosts_[host][i]] = static_cast<int>(host);
        local_rank_of_[hosts_[host][i]] = static_cast<int>(i);
      }
    }
  }
  const char* kind() const override { return "across hosts"; }

 private:
  void do_all_reduce_sum(std::span<float> values) override;
  void do_all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> offsets) override;
  void do_broadcast(Bytes data, int root) override;
  Request do_send(ConstBytes data, int to) override;
  Request do_receive(Bytes data, int from) override;
  bool do_test(Message& message) override;
  bool do_wait_until(Message& message, TimePoint until) override;
  bool do_advance() override {
    const bool local_open = local_->advance();
    return flat_->advance() || local_open;
  }
  void do_look() override {
    local_->look(0, {});
    flat_->look(0, {});
  }
  std::unique_ptr<Communicator> do_split(int color, int key) override;
  void do_abort(const std::string& reason) override {
    local_->abort(reason);
    flat_->abort(reason);
  }
  void do_close() override {
    local_->close();
    flat_->close();
  }

  int host() const { return host_of_[rank()]; }
  bool leads() const { return hosts_[host()].front() == rank(); }
  Communicator& way_to(int peer) const { return host_of_[peer] == host() ? *local_ : *flat_; }
  int there(int peer) const { return host_of_[peer] == host() ? local_rank_of_[peer] : peer; }
  // The parts' patience follows this one's, which can be set.
  void pass_patience() {
    local_->set_timeout(patience().seconds);
    flat_->set_timeout(patience().seconds);
  }
  void reduce(std::span<float> part);

  const std::unique_ptr<Communicator> flat_, local_;
  const Hosts hosts_;
  const std::vector<uint64_t> machines_;  // by rank
  std::vector<int> host_of_, local_rank_of_;
  size_t lanes_ = 0;  // ranks that every host has at least
};

void AcrossHosts::do_all_reduce_sum(std::span<float> values) {
  constexpr size_t kChunk = 1 << 20;  // floats: bounds what a host's contributions take
  pass_patience();
  size_t begin = 0;
  do {
    reduce(values.subspan(begin, std::min(kChunk, values.size() - begin)));
    begin += kChunk;
  } while (begin < values.size());
}

// The sum so far travels: from each run of consecutive ranks of a host to the next, which adds its own in rank order.
// One rank of a host carries one slice, so between hosts goes what one contribution takes, not what all do.
void AcrossHosts::reduce(std::span<float> part) {
  const auto count = static_cast<int64_t>(part.size());
  std::vector<float> local_parts(part.size() * local_->size());
  local_->all_gather(std::as_bytes(part), std::as_writable_bytes(std::span(local_parts)));

  const auto lanes = static_cast<int64_t>(lanes_);
  const int64_t lane = local_rank_of_[rank()];
  const auto slice_bytes = [&](int64_t l) {
    return l < lanes ? (slice_begin(count, l + 1, lanes) - slice_begin(count, l, lanes)) * int64_t{sizeof(float)} : 0;
  };
  std::vector<float> sum(slice_bytes(lane) / sizeof(float)), so_far(sum.size());
  if (lane < lanes) {
    const Bytes sum_bytes = std::as_writable_bytes(std::span(sum));
    const auto carrier = [&](int r) { return hosts_[host_of_[r]][lane]; };  // of this slice on the host of rank r
    for (int first = 0, end = 0; first < size(); first = end) {
      while (end < size() && host_of_[end] == host_of_[first]) ++end;
      if (host_of_[first] != host()) continue;
      std::vector<const float*> terms;
      if (first > 0) {
        flat_->wait(*flat_->receive(std::as_writable_bytes(std::span(so_far)), carrier(first - 1)));
        terms.push_back(so_far.data());
      }
      for (int r = first; r < end; ++r) {
        terms.push_back(local_parts.data() + local_rank_of_[r] * count + slice_begin(count, lane, lanes));
      }
      sum_in_order(terms, static_cast<int64_t>(sum.size()), sum.data());
      if (end < size()) flat_->wait(*flat_->send(sum_bytes, carrier(end)));
    }
    const int last = carrier(size() - 1);
    if (rank() != last) {
      flat_->wait(*flat_->receive(sum_bytes, last));
    } else {
      std::vector<Request> sends;
      for (const auto& ranks : hosts_) {
        if (ranks[lane] != rank()) sends.push_back(flat_->send(sum_bytes, ranks[lane]));
      }
      for (const Request& request : sends) flat_->wait(*request);
    }
  }
  std::vector<int64_t> sizes(local_->size());
  for (int l = 0; l < local_->size(); ++l) sizes[l] = slice_bytes(l);
  local_->all_gather(std::as_bytes(std::span(sum)), std::as_writable_bytes(part), sizes);
}

// A host's parts are gathered, the leaders exchange them, and each tells its host all of them.
void AcrossHosts::do_all_gather(ConstBytes mine, Bytes all, std::span<const int64_t> offsets) {
  pass_patience();
  const auto bytes_of = [&](int r) { return offsets[r + 1] - offsets[r]; };
  std::vector<int64_t> host_offsets(hosts_.size() + 1), sizes;
  for (size_t h = 0; h < hosts_.size(); ++h) {
    host_offsets[h + 1] = host_offsets[h];
    for (const int r : hosts_[h]) host_offsets[h + 1] += bytes_of(r);
  }
  std::vector<std::byte> by_host(all.size());
  const auto part = [&](size_t h) {
    return Bytes(by_host).subspan(host_offsets[h], host_offsets[h + 1] - host_offsets[h]);
  };
  for (const int r : hosts_[host()]) sizes.push_back(bytes_of(r));
  local_->all_gather(mine, part(host()), sizes);
  if (leads()) {
    std::vector<Request> requests;
    for (size_t h = 0; h < hosts_.size(); ++h) {
      if (static_cast<int>(h) == host()) continue;
      requests.push_back(flat_->receive(part(h), hosts_[h].front()));
      requests.push_back(flat_->send(part(host()), hosts_[h].front()));
    }
    for (const Request& request : requests) flat_->wait(*request);
  }
  local_->broadcast(by_host, 0);
  for (size_t h = 0; h < hosts_.size(); ++h) {
    const std::byte* next = by_host.data() + host_offsets[h];
    for (const int r : hosts_[h]) {
      std::copy_n(next, bytes_of(r), all.begin() + offsets[r]);
      next += bytes_of(r);
    }
  }
}

void AcrossHosts::do_broadcast(Bytes data, int root) {
  pass_patience();
  std::vector<Request> sends;
  if (rank() == root) {
    for (const auto& ranks : hosts_) {
      if (ranks.front() != hosts_[host()].front()) sends.push_back(flat_->send(data, ranks.front()));
    }
  }
  const bool at_root = host_of_[root] == host();
  if (!at_root && leads()) flat_->wait(*flat_->receive(data, root));
  local_->broadcast(data, at_root ? local_rank_of_[root] : 0);
  for (const Request& request : sends) flat_->wait(*request);
}

Request AcrossHosts::do_send(ConstBytes data, int to) {
  return std::make_shared<Routed>(to, way_to(to), way_to(to).send(data, there(to)));
}

Request AcrossHosts::do_receive(Bytes data, int from) {
  return std::make_shared<Routed>(from, way_to(from), way_to(from).receive(data, there(from)));
}

bool AcrossHosts::do_test(Message& message) {
  auto& routed = static_cast<Routed&>(message);
  return routed.done = routed.way.test(*routed.inner);
}

bool AcrossHosts::do_wait_until(Message& message, TimePoint until) {
  pass_patience();
  auto& routed = static_cast<Routed&>(message);
  return routed.done = routed.way.wait_until(*routed.inner, until);
}

std::unique_ptr<Communicator> AcrossHosts::do_split(int color, int key) {
  const std::vector<int> ranks = ranks_of(color, key);
  auto flat = flat_->split(color, key);
  if (flat == nullptr) return nullptr;
  std::vector<uint64_t> machines;
  for (const int r : ranks) machines.push_back(machines_[r]);
  return across_hosts(std::move(flat), machines);
}

}  // namespace

std::unique_ptr<Communicator> across_hosts(std::unique_ptr<Communicator> flat, std::span<const uint64_t> machines) {
  FS_CHECK(static_cast<int>(machines.size()) == flat->size(), flat->size(), " ranks have ", machines.size(),
           " machines");
  Hosts hosts;
  std::map<uint64_t, size_t> known;
  for (int r = 0; r < flat->size(); ++r) {
    const auto [place, is_new] = known.emplace(machines[r], hosts.size());
    if (is_new) hosts.emplace_back();
    hosts[place->second].push_back(r);
  }
  auto local = share_memory(*flat, hosts[known.at(machines[flat->rank()])]);
  if (hosts.size() > 1) {
    return std::make_unique<AcrossHosts>(std::move(flat), std::move(local), std::move(hosts),
                                         std::vector(machines.begin(), machines.end()));
  }
  local->keep(std::move(flat));
  return local;
}

std::unique_ptr<Communicator> across_hosts(std::unique_ptr<Communicator> flat) {
  std::vector<uint64_t> machines;
  for (const Member& member : flat->members()) machines.push_back(member.machine);
  return across_hosts(std::move(flat), machines);
}

}  // namespace fastserve
