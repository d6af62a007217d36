#include "bench/limits.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

namespace fastserve::bench {

extern const Peak kPortablePeak;
#ifdef FS_X86
extern const Peak kAvx2Peak;
extern const Peak kAvx512Peak;
extern const Peak kAvx512Bf16Peak;
extern const Peak kAmxPeak;
#endif

namespace {

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
// A sample of arithmetic takes about this long.
constexpr double kComputeSeconds = 4e-3;
// Pieces a thread, so that one that starts late takes fewer.
constexpr int64_t kPieces = 16;

const Peak* find_peak(const std::string& isa) {
#ifdef FS_X86
  for (const Peak* peak : {&kAvx2Peak, &kAvx512Peak, &kAvx512Bf16Peak, &kAmxPeak}) {
    if (isa == peak->isa) return peak;
  }
#endif
  return isa == kPortablePeak.isa ? &kPortablePeak : nullptr;
}

}  // namespace

Arithmetic arithmetic_of(WeightFormat weights) {
  if (weights == WeightFormat::kFloat32) return Arithmetic::kFloat32;
  return weights == WeightFormat::kBFloat16 ? Arithmetic::kBFloat16 : Arithmetic::kInt8;
}

Arithmetic arithmetic_of(KvFormat format) {
  if (format == KvFormat::kFloat32) return Arithmetic::kFloat32;
  return format == KvFormat::kBFloat16 ? Arithmetic::kBFloat16 : Arithmetic::kInt8;
}

Limits::Limits(const Options& options, const std::string& isa, int threads) : peak_(find_peak(isa)) {
  if (!options.on_host()) {
    gemm_size_ = options.integer("limit-gemm", 64, 1 << 16);
    probe_ = make_device_probe(options.device(), DType::kBFloat16, options.cold_bytes());
    return;
  }
  pool_ = std::make_unique<ThreadPool>(threads);
  buffer_ = Buffer(options.cold_bytes());
  std::memset(buffer_.as<char>(), 1, buffer_.bytes());  // pages nobody wrote to are all the same one
}

double Limits::read() {
  if (probe_ != nullptr) return read_.emplace_back(probe_->copy_rate());
  const auto kernel = peak_ != nullptr ? peak_->read : kPortablePeak.read;
  const int64_t pieces = kPieces * pool_->size(), blocks = static_cast<int64_t>(buffer_.bytes()) / 4096;
  std::atomic<uint64_t> total{0};
  const double seconds = seconds_of([&] {
    pool_->run(pieces, [&](int64_t piece, int) {
      const int64_t first = piece * blocks / pieces * 4096, last = (piece + 1) * blocks / pieces * 4096;
      total += kernel(buffer_.as<char>() + first, last - first);
    });
  });
  if (total == 0) return kUnknown;  // it never is, which the compiler cannot know
  read_.push_back(static_cast<double>(blocks * 4096) / seconds);
  return read_.back();
}

double Limits::compute(Arithmetic arithmetic) {
  if (probe_ != nullptr) {
    if (arithmetic != Arithmetic::kBFloat16) return kUnknown;
    return compute_[static_cast<int>(arithmetic)].emplace_back(probe_->gemm_rate(gemm_size_));
  }
  if (peak_ == nullptr) return kUnknown;
  const auto kind = static_cast<int>(arithmetic);
  const int64_t pieces = kPieces * pool_->size();
  std::atomic<int64_t> operations{0};
  const auto run = [&](int64_t steps) {
    return seconds_of([&] { pool_->run(pieces, [&](int64_t, int) { operations += peak_->run[kind](steps); }); });
  };
  constexpr int64_t kTrial = 256;
  const double trial = run(kTrial);  // also wakes the threads
  const auto steps = static_cast<int64_t>(kTrial * std::clamp(kComputeSeconds / trial, 1.0, 1e4));
  operations = 0;
  const double seconds = run(steps);
  compute_[kind].push_back(static_cast<double>(operations) / seconds);
  return compute_[kind].back();
}

double Limits::transfer(DeviceProbe::Transfer transfer) {
  return transfer_[static_cast<int>(transfer)].emplace_back(probe_->transfer_rate(transfer));
}

void Limits::report_device(Report& report) const {
  std::string line;
  const auto tell = [&](const Samples& samples, const std::string& key, const std::string& what,
                        const std::string& unit) {
    if (samples.empty()) return;
    const double value = median(samples) / 1e9;
    report.fact(key, value);
    char text[160];
    std::snprintf(text, sizeof text, "%s%s %.1f %s", line.empty() ? "" : ", ", what.c_str(), value, unit.c_str());
    line += text;
  };
  const Samples& products = compute_[static_cast<int>(Arithmetic::kBFloat16)];
  if (!products.empty()) report.fact("gemm_library", probe_->gemm_library());
  tell(read_, "limit_copy_gb_s", "copies read and write", "GB/s");
  tell(products, "limit_bfloat16_gflop_s", "bfloat16 products of " + probe_->gemm_library(), "GFLOP/s");
  tell(transfer_[0], "limit_to_host_gb_s", "pinned memory takes", "GB/s");
  tell(transfer_[1], "limit_to_device_gb_s", "gives", "GB/s");
  tell(transfer_[2], "limit_both_ways_gb_s", "both at once", "GB/s");
  std::printf("limits: %s\n", line.c_str());
}

void Limits::report(Report& report) const {
  if (probe_ != nullptr) return report_device(report);
  report.fact("threads", int64_t{threads()});
  report.fact("limit_read_gb_s", median(read_) / 1e9);
  report.fact("limit_float32_gflop_s", median(compute_[0]) / 1e9);
  report.fact("limit_bfloat16_gflop_s", median(compute_[1]) / 1e9);
  report.fact("limit_int8_gflop_s", median(compute_[2]) / 1e9);
  std::printf("limits, %d threads: read %.1f GB/s", threads(), median(read_) / 1e9);
  const char* names[] = {"float32", "bfloat16", "int8"};
  for (int kind = 0; kind < 3; ++kind) {
    if (!compute_[kind].empty()) std::printf(", %s %.0f GFLOP/s", names[kind], median(compute_[kind]) / 1e9);
  }
  std::printf("\n");
}

void Measured::add(double seconds, double read, double compute) {
  seconds_.push_back(seconds);
  read_percent_.push_back(100 * work_.bytes / seconds / read);
  compute_percent_.push_back(100 * work_.flops / seconds / compute);
}

std::vector<Report::Column> Measured::columns(const Limits& limits) {
  const bool host = limits.probe() == nullptr;
  return {{"seconds", ""},           {"milliseconds", "ms", 3},
          {"gb_s", "GB/s", 1},       {"read_percent", host ? "% of read" : "% of copy", 1},
          {"gflop_s", "GFLOP/s", 1}, {"compute_percent", host ? "% of mul-add" : "% of GEMM", 1}};
}

std::vector<Report::Value> Measured::values() const {
  return {seconds(),
          1e3 * seconds(),
          work_.bytes / seconds() / 1e9,
          median(read_percent_),
          work_.flops / seconds() / 1e9,
          median(compute_percent_)};
}

}  // namespace fastserve::bench
