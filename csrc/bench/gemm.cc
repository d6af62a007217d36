// Products with each weight matrix of a model, by weight format and number of rows. Matrices come from memory, as they
// do in a forward pass: there are as many copies of each as the caches cannot hold, used in turn.
#include <algorithm>
#include <cstring>
#include <limits>
#include <map>

#include "backend/device.h"
#include "bench/limits.h"
#include "bench/random_model.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

// The head computes logits only where a token is sampled: never for a whole prompt.
constexpr int64_t kMostHeadRows = 64;
constexpr int64_t kManyRows = 128;
// A sample is this long at least, so that the clock and a sleeping thread do not matter.
constexpr double kSampleSeconds = 4e-3, kDeviceSampleSeconds = 20e-3;

struct Shape {
  const char* name;
  int64_t n, k;
  bool wide = false;  // its products go to the residual, or are logits
  int64_t gated = 0;  // of the columns of gate and of up, if on a device they meet
};

const std::vector<std::string>& matrix_names() {
  static const std::vector<std::string> names = {"qkv", "out", "up", "down", "head"};
  return names;
}

std::vector<Shape> shapes(const ModelSpec& spec) {
  return {{"qkv", spec.qkv_width(), spec.hidden_size},
          {"out", spec.hidden_size, spec.num_heads * spec.head_dim, true},
          {"up", spec.up_offset() + spec.intermediate_size, spec.hidden_size, false,
           spec.gated_mlp ? spec.intermediate_size : 0},
          {"down", spec.hidden_size, spec.intermediate_size, true},
          {"head", spec.vocab_size, spec.hidden_size, true}};
}

// One matrix as often as it takes to be cold, and a product with the next copy at every call.
class Product {
 public:
  Product(Backend& backend, const Shape& shape, WeightFormat format, int64_t most_rows, int64_t cold_bytes)
      : backend_(backend),
        ld_input_(round_up(shape.k, kPad)),
        ld_output_(round_up(shape.n, kPad)),
        input_(random_activations(backend, most_rows * ld_input_)),
        output_(backend.allocate(most_rows * ld_output_ * static_cast<int64_t>(sizeof(float)))),
        wide_(shape.wide),
        meets_(shape.gated > 0 && !backend.on_host()),
        activation_{Activation::kSilu, true, shape.gated} {
    const RandomRows weights(format, shape.k);
    int64_t bytes = 0;
    do {
      copies_.push_back(meets_ ? backend.make_gated_matrix(shape.gated, shape.k, format, activation_.kind)
                               : backend.make_matrix(shape.n, shape.k, format));
      fill(backend, *copies_.back(), weights);
      bytes += copies_.back()->bytes();
    } while (bytes < cold_bytes);
  }

  int64_t bytes() const { return copies_.front()->bytes(); }

  // Seconds of one of `calls` products.
  double seconds(int64_t rows, int64_t calls) {
    return seconds_of([&] {
             for (int64_t i = 0; i < calls; ++i) {
               backend_.gemm({.input = input_.as<void>(),
                              .ld_input = ld_input_,
                              .weight = copies_[next_++ % copies_.size()].get(),
                              .bias = nullptr,
                              .output = output_.as<void>(),
                              .ld_output = ld_output_,
                              .m = rows,
                              .wide = wide_,
                              .accumulate = false,
                              .activation = meets_ ? &activation_ : nullptr});
             }
             backend_.end();
             backend_.wait();
           }) /
           static_cast<double>(calls);
  }

 private:
  Backend& backend_;
  int64_t ld_input_, ld_output_;
  Buffer input_, output_;
  bool wide_, meets_;
  ActivationArgs activation_;
  std::vector<std::unique_ptr<Matrix>> copies_;
  size_t next_ = 0;
};

// Many rows by 16-bit weights: by every way that the device has.
void add_ways(DeviceProbe& probe, const Shape& shape, WeightFormat format, int64_t rows,
              std::vector<Report::Value>& values) {
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  ProductRates rates{kUnknown, kUnknown, kUnknown, ""};
  if (rows >= kManyRows && format == WeightFormat::kBFloat16) {
    rates = probe.product_rates(rows, shape.n, shape.k, shape.wide, shape.gated > 0);
  }
  for (const double rate : {rates.warps, rates.warpgroups, rates.library}) values.emplace_back(rate / 1e9);
  values.emplace_back(rates.taken);
}

void run(const Options& options, Report& report) {
  const auto presets = options.choices("preset", preset_names());
  const auto matrices = options.choices("matrix", matrix_names());
  const auto formats = options.choices("weights", weight_names());
  const auto rows = options.integers("rows", 1, 65536);
  const double sample = options.on_host() ? kSampleSeconds : kDeviceSampleSeconds;
  std::map<DType, std::unique_ptr<Backend>> backends;
  Limits limits(options, report.isa());

  std::vector<Report::Column> columns = {{"preset", "model"}, {"matrix", "matrix"},   {"n", "n"},
                                         {"k", "k"},          {"weights", "weights"}, {"rows", "rows"}};
  for (Report::Column& column : Measured::columns(limits)) columns.push_back(std::move(column));
  DeviceProbe* const probe = limits.probe();
  if (probe != nullptr) {
    for (const char* way : {"mma_gflop_s", "wgmma_gflop_s", "library_gflop_s"}) {
      columns.push_back({way, std::string(way, std::strchr(way, '_')) + " GFLOP/s", 0});
    }
    columns.push_back({"taken", "taken"});
    report.fact("wgmma", probe->warpgroups());
  }
  report.columns(columns);

  for (const std::string& name : presets) {
    for (const Shape& shape : shapes(preset(name))) {
      if (std::find(matrices.begin(), matrices.end(), shape.name) == matrices.end()) continue;
      for (const std::string& format_name : formats) {
        const WeightFormat format = parse_weight_format(format_name);
        std::vector<int64_t> wanted;
        for (const int64_t m : rows) {
          if (m <= kMostHeadRows || std::string(shape.name) != "head") wanted.push_back(m);
        }
        if (wanted.empty()) continue;
        const DType dtype = options.on_host() ? DType::kFloat32 : dtype_of(format);
        std::unique_ptr<Backend>& backend = backends[dtype];
        if (backend == nullptr) backend = make_backend(options.device(), dtype, options.threads());
        Product product(*backend, shape, format, *std::max_element(wanted.begin(), wanted.end()), options.cold_bytes());
        std::vector<Measured> measured;
        std::vector<int64_t> calls;
        for (const int64_t m : wanted) {
          const double size = static_cast<double>(shape.n) * static_cast<double>(shape.k);
          measured.emplace_back(
              Work{static_cast<double>(product.bytes()), 2 * size * static_cast<double>(m), arithmetic_of(format)});
          const double once = std::min(product.seconds(m, 1), product.seconds(m, 1));
          calls.push_back(std::max<int64_t>(1, static_cast<int64_t>(sample / once)));
        }
        for (int round = 0; round < options.repeats(); ++round) {
          for (size_t i = 0; i < wanted.size(); ++i) {
            measured[i].sample(limits, [&] { return product.seconds(wanted[i], calls[i]); });
          }
        }
        for (size_t i = 0; i < wanted.size(); ++i) {
          std::vector<Report::Value> values = {name, shape.name, shape.n, shape.k, format_name, wanted[i]};
          for (Report::Value& value : measured[i].values()) values.push_back(std::move(value));
          if (probe != nullptr) add_ways(*probe, shape, format, wanted[i], values);
          report.row(std::move(values));
        }
      }
    }
  }
  limits.report(report);
}

}  // namespace

int main(int count, char** arguments) {
  Options options(
      "gemm",
      "Products of activations with each weight matrix of a model, in GB/s of weights and GFLOP/s, and their "
      "shares of\nwhat memory and the multiply-add units reach beside them.");
  options.add_device();
  options.add("preset", "NAME,...", "smollm2", "shapes of: smollm2, llama-1b, llama-8b, tiny", "llama-8b");
  options.add("matrix", "NAME,...", "qkv,out,up,down,head",
              "which of its matrices; up: gate and up, on a device with what they make");
  options.add("weights", "NAME,...", "bfloat16,q8_0,q4_0",
              "how weights are held: float32, bfloat16, int8, q8_0, q4_0, q4_1");
  options.add("rows", "N,...", "1,8,32,512", "tokens in a product; the head takes at most 64", "1,8,32,64,512,2048");
  return run_main(count, arguments, options, run);
}
