#include "bench/harness.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <thread>

#include "backend/cpu/kernels.h"

namespace fastserve::bench {

namespace {

constexpr int kNumberWidth = 9;
constexpr int kTextWidth = 12;
constexpr double kBusy = 0.5;               // of the cores
constexpr const char* kDeviceCold = "512";  // ten times the caches of the largest devices

std::string join(const std::vector<std::string>& parts) {
  std::string joined;
  for (const std::string& part : parts) joined += (joined.empty() ? "" : ", ") + part;
  return joined;
}

std::string formatted(const Report::Value& value, int decimals) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  if (const auto* whole = std::get_if<int64_t>(&value)) return std::to_string(*whole);
  const double number = std::get<double>(value);
  if (!std::isfinite(number)) return "-";
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", decimals, number);
  return buffer;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      result += escape;
    } else {
      result += c;
    }
  }
  return result + '"';
}

std::string as_json(const Report::Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return quoted(*text);
  if (const auto* whole = std::get_if<int64_t>(&value)) return std::to_string(*whole);
  const double number = std::get<double>(value);
  if (!std::isfinite(number)) return "null";
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.9g", number);
  return buffer;
}

// The instruction sets of this machine, best first.
std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const auto* table : cpu::supported_kernels()) names.emplace_back(table->name);
  return names;
}

// How many threads wanted to run lately, NaN where that is unknown.
double load_average() {
  double load = 0;
  return getloadavg(&load, 1) == 1 ? load : std::numeric_limits<double>::quiet_NaN();
}

// Megabytes, as --cold takes them, that no cache keeps from one pass to the next.
int64_t default_cold() {
  constexpr int64_t kLeast = 256, kMost = 1024;
#ifdef _SC_LEVEL3_CACHE_SIZE
  const int64_t cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE)) >> 20;
#else
  const int64_t cache = 0;
#endif
  return std::clamp(2 * cache, kLeast, kMost);
}

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File open_file(const std::string& path, const char* mode) {
  return {std::fopen(path.c_str(), mode), [](std::FILE* file) { return std::fclose(file); }};
}

}  // namespace

double median(Samples samples) {
  if (samples.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  if (samples.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(samples.begin(), middle)) / 2;
}

Options::Options(std::string name, std::string summary) : name_(std::move(name)), summary_(std::move(summary)) {
  add("threads", "N", "0", "threads; 0: one a core");
  add("isa", "NAME", "", "instruction set: " + join(isa_names()) + " (default: FASTSERVE_ISA, else the first)");
  add("repeats", "N", "5", "measurements of everything, in turn; medians are told");
  add("cold", "MB", std::to_string(default_cold()), "read that much before touching any of it again", kDeviceCold);
  add("json", "FILE", "", "also write the result as JSON");
}

void Options::add(const std::string& name, const std::string& value, const std::string& fallback,
                  const std::string& help, const std::string& on_device) {
  order_.push_back(name);
  options_[name] = {value, fallback, help, on_device};
}

void Options::add_device() {
  add("device", "NAME", "cpu", "where the work is done: cpu, cuda, or one of several: cuda:1");
  add("limit-gemm", "N", "8192", "on a device, its limit is that of products of matrices so large");
}

std::string Options::device() const { return options_.contains("device") ? text("device") : "cpu"; }

bool Options::parse(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    const std::string given = arguments[i];
    if (given == "--help" || given == "-h") return false;
    const size_t equals = given.find('=');
    const std::string name = given.substr(0, equals);
    const auto found = name.starts_with("--") ? options_.find(name.substr(2)) : options_.end();
    if (found == options_.end()) throw UsageError("there is no option '" + name + "'; --help lists them");
    found->second.given = true;
    if (equals != std::string::npos) {
      found->second.value = given.substr(equals + 1);
    } else if (++i < count) {
      found->second.value = arguments[i];
    } else {
      throw UsageError(name + " needs a value");
    }
  }
  if (!on_host()) {
    for (auto& [name, option] : options_) {
      if (!option.given && !option.on_device.empty()) option.value = option.on_device;
    }
  }
  return true;
}

std::string Options::help() const {
  std::string text = "usage: " + name_ + " [options]\n\n" + summary_ + "\n\n";
  for (const std::string& name : order_) {
    const Option& option = options_.at(name);
    std::string line = "  --" + name + " " + option.value_name;
    line.resize(std::max<size_t>(line.size() + 2, 22), ' ');
    const std::string device =
        option.on_device.empty() || !options_.contains("device") ? "" : "; on a device " + option.on_device;
    text += line + option.help + (option.value.empty() ? "" : " (default " + option.value + device + ")") + "\n";
  }
  return text;
}

std::vector<std::string> Options::split(const std::string& name) const {
  const std::string& value = text(name);
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= value.size();) {
    const size_t end = std::min(value.find(',', begin), value.size());
    parts.push_back(value.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::vector<int64_t> Options::integers(const std::string& name, int64_t low, int64_t high) const {
  std::vector<int64_t> values;
  for (const std::string& part : split(name)) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    if (error != std::errc() || end != part.data() + part.size() || value < low || value > high) {
      throw UsageError("--" + name + " takes whole numbers from " + std::to_string(low) + " to " +
                       std::to_string(high) + ", got '" + part + "'");
    }
    values.push_back(value);
  }
  return values;
}

int64_t Options::integer(const std::string& name, int64_t low, int64_t high) const {
  const auto values = integers(name, low, high);
  if (values.size() != 1) throw UsageError("--" + name + " takes one number, got '" + text(name) + "'");
  return values.front();
}

std::vector<std::string> Options::choices(const std::string& name, const std::vector<std::string>& allowed) const {
  const auto values = split(name);
  for (const std::string& value : values) {
    if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
      throw UsageError("--" + name + " must be of " + join(allowed) + ", got '" + value + "'");
    }
  }
  return values;
}

void Report::row(std::vector<Value> values) {
  const auto print = [this](const auto& cell) {
    std::string line;
    for (size_t i = 0; i < columns_.size(); ++i) {
      if (columns_[i].heading.empty()) continue;
      const auto [text, left] = cell(i);
      const size_t width = std::max<size_t>(left ? kTextWidth : kNumberWidth, columns_[i].heading.size());
      const std::string padding(width - std::min(width, text.size()), ' ');
      line += left ? text + padding : padding + text;
      line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::printf("%s\n", line.c_str());
  };
  const auto is_text = [&](size_t i) { return std::holds_alternative<std::string>(values[i]); };
  if (rows_.empty()) print([&](size_t i) { return std::pair{columns_[i].heading, is_text(i)}; });
  print([&](size_t i) { return std::pair{formatted(values[i], columns_[i].decimals), is_text(i)}; });
  std::fflush(stdout);
  rows_.push_back(std::move(values));
}

std::string Report::json() const {
  std::string text = "{\n";
  for (const auto& [key, value] : facts_) text += "  " + quoted(key) + ": " + as_json(value) + ",\n";
  text += "  \"results\": [";
  for (size_t i = 0; i < rows_.size(); ++i) {
    text += i == 0 ? "\n    {" : ",\n    {";
    for (size_t j = 0; j < columns_.size(); ++j) {
      text += (j == 0 ? "" : ", ") + quoted(columns_[j].key) + ": " + as_json(rows_[i][j]);
    }
    text += "}";
  }
  return text + "\n  ]\n}\n";
}

int run_main(int count, char** arguments, Options& options, const std::function<void(const Options&, Report&)>& body) {
  const auto complain = [&](const std::exception& error, int status) {
    std::fprintf(stderr, "%s: %s\n", options.benchmark().c_str(), error.what());
    return status;
  };
  try {
    if (!options.parse(count, arguments)) {
      std::printf("%s", options.help().c_str());
      return 0;
    }
    if (!options.text("isa").empty()) {
      options.choices("isa", isa_names());
      setenv("FASTSERVE_ISA", options.text("isa").c_str(), 1);
    }
    const char* isa = nullptr;
    try {
      isa = cpu::select_kernels().name;
    } catch (const std::exception& error) {
      throw UsageError(error.what());
    }
#ifdef FS_CUDA_PLUGIN
    setenv("FASTSERVE_CUDA_PLUGIN", FS_CUDA_PLUGIN, 0);  // this build's, unless another is asked for
#endif
    const std::string path = options.text("json");
    // Found out before the work, and without emptying what is there.
    if (!path.empty() && !open_file(path, "a")) throw UsageError("--json: cannot write '" + path + "'");

    Report report(isa);
    report.fact("benchmark", options.benchmark());
    report.fact("repeats", int64_t{options.repeats()});
    const double load = load_average();  // of others: this process has done nothing yet
    report.fact("load_average", load);
    options.threads();
    body(options, report);
    const unsigned cores = std::thread::hardware_concurrency();
    if (load > kBusy * cores) {
      std::printf("other work kept this machine busy (load %.1f on %u cores): figures waver\n", load, cores);
    }
    if (!path.empty()) {
      const std::string json = report.json();
      File file = open_file(path, "w");
      const bool written = file && std::fwrite(json.data(), 1, json.size(), file.get()) == json.size();
      if (!file || std::fclose(file.release()) != 0 || !written) {
        throw std::runtime_error("cannot write '" + path + "'");
      }
    }
  } catch (const UsageError& error) {
    return complain(error, 2);
  } catch (const std::exception& error) {
    return complain(error, 1);
  }
  return 0;
}

}  // namespace fastserve::bench
