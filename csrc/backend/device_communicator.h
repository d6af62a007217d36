// Ranks that exchange what their devices hold without the host in between.
#pragma once

#include <cstdint>

namespace fastserve {

// All of it is queued, in the order of the backend's operations. A wait for what is queued (Backend) ends with a
// GroupError when a rank is gone or has given up, and nothing works afterwards.
class DeviceCommunicator {
 public:
  virtual ~DeviceCommunicator() = default;

  // In place: ((p0 + p1) + p2) + … in rank order, as Communicator::all_reduce_sum does it, to the bit.
  virtual void all_reduce_sum(float* values, int64_t count) = 0;
  virtual void send(const float* values, int64_t count, int to) = 0;
  virtual void receive(float* values, int64_t count, int from) = 0;
  // Whether it may be called for by what Backend::run() runs.
  virtual bool repeatable() const = 0;
};

}  // namespace fastserve
