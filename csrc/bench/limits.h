// What the machine can do at best, measured beside the work it limits: bytes read from memory a second, and
// multiply-adds a second from registers. Of a device that is not the host: bytes that copies within its memory read and
// write a second, and operations a second of a large matrix product of the best library there is.
#pragma once

#include <memory>
#include <vector>

#include "backend/device_probe.h"
#include "bench/harness.h"
#include "bench/peak.h"
#include "common/buffer.h"
#include "common/dtype.h"
#include "common/thread_pool.h"

namespace fastserve::bench {

// Kinds of multiply-add, by the type of the factors.
enum class Arithmetic { kFloat32, kBFloat16, kInt8 };
Arithmetic arithmetic_of(WeightFormat weights);
Arithmetic arithmetic_of(KvFormat format);

// A floating-point operation is a multiplication or an addition, of integers also.
struct Work {
  double bytes;  // that have to come from memory
  double flops;
  Arithmetic arithmetic;
};

class Limits {
 public:
  Limits(const Options& options, const std::string& isa) : Limits(options, isa, options.threads()) {}
  Limits(const Options& options, const std::string& isa, int threads);

  int threads() const { return pool_->size(); }
  // Null for the host.
  DeviceProbe* probe() const { return probe_.get(); }
  // Measures one sample, in bytes or operations a second. NaN for an instruction set without loops of its own, and on a
  // device for other than 16-bit floats.
  double read();
  double compute(Arithmetic arithmetic);
  // Bytes a second between pinned memory and the device's.
  double transfer(DeviceProbe::Transfer transfer);
  // Adds the medians of everything that was measured, and how many threads there were.
  void report(Report& report) const;

 private:
  void report_device(Report& report) const;

  std::unique_ptr<ThreadPool> pool_;    // of the host, ...
  std::unique_ptr<DeviceProbe> probe_;  // ... or of a device, in one of these
  int64_t gemm_size_ = 0;
  const Peak* peak_;
  Buffer buffer_;
  Samples read_, compute_[3], transfer_[3];
};

// What one piece of work achieved, and the share of the limits measured right before: both waver on a shared machine,
// their ratio less so.
class Measured {
 public:
  explicit Measured(const Work& work) : work_(work) {}
  // Measures both limits, then `body`, which returns the seconds it took.
  template <class Body>
  void sample(Limits& limits, Body&& body) {
    const double read = limits.read(), compute = limits.compute(work_.arithmetic);
    add(body(), read, compute);
  }
  void add(double seconds, double read, double compute);

  double seconds() const { return median(seconds_); }
  // The values of columns(): seconds, ms, GB/s, percent, GFLOP/s, percent.
  std::vector<Report::Value> values() const;
  static std::vector<Report::Column> columns(const Limits& limits);

 private:
  Work work_;
  Samples seconds_, read_percent_, compute_percent_;
};

}  // namespace fastserve::bench
