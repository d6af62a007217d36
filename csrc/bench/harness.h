// What the benchmark binaries share: options, medians, a table for people and the same as JSON.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace fastserve::bench {

// An option that cannot be: one line, and exit status 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Samples of one measurement.
using Samples = std::vector<double>;
double median(Samples samples);  // NaN of none

// Seconds that `body` takes.
template <class Body>
double seconds_of(Body&& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// `--name value` and `--name=value`. Every benchmark has --help, --threads, --isa, --repeats, --cold and --json.
class Options {
 public:
  Options(std::string name, std::string summary);
  // Declares an option; `fallback` is what it is when not given, and `on_device` the same on a device that is not the
  // host, where that is not empty.
  void add(const std::string& name, const std::string& value, const std::string& fallback, const std::string& help,
           const std::string& on_device = "");
  // Declares --device, and --limit-gemm for the limits there.
  void add_device();
  // Throws UsageError. Returns false when help was asked for.
  bool parse(int count, char** arguments);

  const std::string& benchmark() const { return name_; }
  std::string help() const;
  const std::string& text(const std::string& name) const { return options_.at(name).value; }
  // Throw UsageError unless all values are in [low, high], or are among `allowed`.
  int64_t integer(const std::string& name, int64_t low, int64_t high) const;
  std::vector<int64_t> integers(const std::string& name, int64_t low, int64_t high) const;
  std::vector<std::string> choices(const std::string& name, const std::vector<std::string>& allowed) const;

  int threads() const { return static_cast<int>(integer("threads", 0, 4096)); }
  int repeats() const { return static_cast<int>(integer("repeats", 1, 1000000)); }
  // Far more than the caches hold.
  int64_t cold_bytes() const { return integer("cold", 1, 1 << 20) << 20; }
  // Where the work is done: cpu without the option.
  std::string device() const;
  bool on_host() const { return device() == "cpu"; }

 private:
  struct Option {
    std::string value_name, value, help, on_device;
    bool given = false;
  };
  std::vector<std::string> split(const std::string& name) const;

  std::string name_, summary_;
  std::vector<std::string> order_;
  std::map<std::string, Option> options_;
};

// The result: facts about the run, and rows under named columns. Rows are printed as they come.
class Report {
 public:
  using Value = std::variant<std::string, int64_t, double>;  // a number that is not finite is unknown: "-" and null
  struct Column {
    std::string key;      // in JSON
    std::string heading;  // empty: in JSON only
    int decimals = 0;     // printed
  };

  explicit Report(std::string isa) : isa_(std::move(isa)) { fact("isa", isa_); }
  const std::string& isa() const { return isa_; }  // what the run was made for
  void fact(const std::string& key, Value value) { facts_.emplace_back(key, std::move(value)); }
  void columns(std::vector<Column> columns) { columns_ = std::move(columns); }
  void row(std::vector<Value> values);
  std::string json() const;

 private:
  std::string isa_;
  std::vector<std::pair<std::string, Value>> facts_;
  std::vector<Column> columns_;
  std::vector<std::vector<Value>> rows_;
};

// A benchmark's main(): parses, forces the instruction set, runs `body` and writes JSON. Exit status 0; 2 after a
// UsageError and 1 after any other, each told in one line.
int run_main(int count, char** arguments, Options& options, const std::function<void(const Options&, Report&)>& body);

}  // namespace fastserve::bench
