// What the machine can do at best, measured beside the work it limits: bytes read from memory a second, and
// multiply-adds a second from registers.
#pragma once

#include <vector>

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

  int threads() const { return pool_.size(); }
  // Measures one sample, in bytes or operations a second. NaN for an instruction set without loops of its own.
  double read();
  double compute(Arithmetic arithmetic);
  // Adds the medians of everything that was measured, and how many threads there were.
  void report(Report& report) const;

 private:
  ThreadPool pool_;
  const Peak* peak_;
  Buffer buffer_;
  Samples read_, compute_[3];
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
  static std::vector<Report::Column> columns();

 private:
  Work work_;
  Samples seconds_, read_percent_, compute_percent_;
};

}  // namespace fastserve::bench
