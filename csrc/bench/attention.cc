// Attention over a paged pool: batches of decodes, and prompts. Keys and values come from memory, as they do in a
// forward pass: calls walk through as many layers as the caches cannot hold.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/device.h"
#include "bench/limits.h"
#include "bench/random_model.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

constexpr double kSampleSeconds = 4e-3, kDeviceSampleSeconds = 20e-3;
constexpr double kMostBytes = 4e9, kMostDeviceBytes = 40e9;  // of one pool
constexpr int64_t kStored = 256;                             // tokens put into the pool at a time

// `jobs` jobs of `context` positions, of which attention is computed for the last `tokens`.
struct Case {
  const char* phase;
  int64_t jobs, context, tokens;
};

class Attention {
 public:
  Attention(const ModelSpec& spec, KvFormat format, int64_t block_size, const Case& batch, const Options& options)
      : backend_(make_backend(options.device(), format == KvFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16,
                              options.threads())),
        batch_(batch),
        blocks_(ceil_div(batch.context, block_size)),
        ld_(round_up(spec.qkv_width(), kPad)),
        ld_output_(round_up(spec.num_heads * spec.head_dim, kPad)),
        scale_(1.0f / std::sqrt(static_cast<float>(spec.head_dim))),
        heads_(spec.num_heads),
        tables_(batch.jobs * blocks_) {
    shape_ = {format, 1, spec.num_kv_heads, spec.head_dim, block_size};
    const int64_t layer_bytes = backend_->block_bytes(shape_) * blocks_ * batch.jobs;
    shape_.num_layers = std::clamp<int64_t>(ceil_div(options.cold_bytes(), layer_bytes), 1, spec.num_layers);
    const double bytes = static_cast<double>(layer_bytes) * static_cast<double>(shape_.num_layers);
    const double most = options.on_host() ? kMostBytes : kMostDeviceBytes;
    if (bytes > most) {
      throw UsageError("keys and values of " + std::to_string(batch.jobs) + " jobs of " +
                       std::to_string(batch.context) + " positions take more than " +
                       std::to_string(static_cast<int64_t>(most / 1e9)) + " GB; name fewer or shorter ones");
    }
    pool_ = backend_->allocate(static_cast<int64_t>(bytes));
    backend_->set_kv_pool(shape_, pool_.as<char>());
    std::iota(tables_.begin(), tables_.end(), 0);

    const int64_t tokens = std::max(kStored, batch.jobs * batch.tokens);
    qkv_ = random_activations(*backend_, tokens * ld_);
    output_ = backend_->allocate(tokens * ld_output_ * size_of(backend_->activations()));
    store();
    for (int64_t job = 0; job < batch.jobs; ++job) {
      rows_.push_back({job * batch.tokens, batch.tokens, batch.context - batch.tokens, &tables_[job * blocks_]});
    }
    begin(rows_);
  }

  Work work(const ModelSpec& spec) const {
    const auto jobs = static_cast<double>(batch_.jobs), context = static_cast<double>(batch_.context);
    const auto tokens = static_cast<double>(batch_.tokens);
    const double pairs = jobs * tokens * (context - (tokens - 1) / 2);
    const auto width = static_cast<double>(spec.head_dim);
    return {jobs * context * 2 * static_cast<double>(spec.num_kv_heads) * width *
                static_cast<double>(size_of(shape_.format)),
            4 * pairs * static_cast<double>(spec.num_heads) * width, arithmetic_of(shape_.format)};
  }

  double seconds(int64_t calls) {
    return seconds_of([&] {
             for (int64_t i = 0; i < calls; ++i) {
               backend_->attention({.qkv = qkv_.as<void>(),
                                    .ld = ld_,
                                    .output = output_.as<void>(),
                                    .ld_output = ld_output_,
                                    .num_heads = heads_,
                                    .query_group = heads_ / shape_.num_kv_heads,
                                    .query_offset = 0,
                                    .scale = scale_,
                                    .layer = layer_++ % shape_.num_layers});
             }
             finish();
           }) /
           static_cast<double>(calls);
  }

 private:
  // Which tokens they are does not matter here.
  void begin(std::span<const Row> rows) {
    const int64_t tokens = rows.back().first + rows.back().tokens;
    const std::vector<int32_t> ids(tokens), positions(tokens);
    backend_->begin({.rows = rows, .token_ids = ids, .positions = positions, .logit_tokens = {}});
  }
  void finish() {
    backend_->end();
    backend_->wait();
  }
  void store() {
    for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
      for (int64_t job = 0; job < batch_.jobs; ++job) {
        for (int64_t start = 0; start < batch_.context; start += kStored) {
          const Row row{0, std::min(kStored, batch_.context - start), start, &tables_[job * blocks_]};
          begin({&row, 1});
          backend_->rope_and_store({.qkv = qkv_.as<void>(),
                                    .ld = ld_,
                                    .cos_sin = nullptr,
                                    .rotary_half = 0,
                                    .q_norm = nullptr,
                                    .k_norm = nullptr,
                                    .eps = 0,
                                    .num_heads = heads_,
                                    .layer = layer});
          finish();
        }
      }
    }
  }

  std::unique_ptr<Backend> backend_;
  Case batch_;
  int64_t blocks_, ld_, ld_output_;
  float scale_;
  int64_t heads_;
  std::vector<int32_t> tables_;
  KvShape shape_{};
  Buffer pool_, qkv_, output_;
  std::vector<Row> rows_;
  int64_t layer_ = 0;
};

void run(const Options& options, Report& report) {
  const auto presets = options.choices("preset", preset_names());
  const auto dtypes = options.choices("dtype", dtype_names());
  const int64_t block_size = options.integer("block-size", 1, 4096);
  std::vector<Case> batches;
  const auto jobs = options.integers("rows", 1, 4096);
  for (const int64_t context : options.integers("context", 1, 1 << 20)) {
    for (const int64_t count : jobs) batches.push_back({"decode", count, context, 1});
  }
  for (const int64_t tokens : options.integers("tokens", 0, 1 << 20)) {
    if (tokens > 0) batches.push_back({"prefill", 1, tokens, tokens});
  }
  const double sample = options.on_host() ? kSampleSeconds : kDeviceSampleSeconds;
  Limits limits(options, report.isa());

  std::vector<Report::Column> columns = {{"preset", "model"}, {"phase", "phase"},     {"dtype", "dtype"},
                                         {"rows", "rows"},    {"context", "context"}, {"tokens", "tokens"}};
  for (Report::Column& column : Measured::columns(limits)) columns.push_back(std::move(column));
  report.columns(columns);
  for (const std::string& name : presets) {
    const ModelSpec spec = preset(name);
    for (const std::string& dtype : dtypes) {
      for (const Case& batch : batches) {
        Attention attention(spec, parse_kv_format(dtype), block_size, batch, options);
        Measured measured(attention.work(spec));
        const double once = std::min(attention.seconds(1), attention.seconds(1));
        const auto calls = std::max<int64_t>(1, static_cast<int64_t>(sample / once));
        for (int round = 0; round < options.repeats(); ++round) {
          measured.sample(limits, [&] { return attention.seconds(calls); });
        }
        std::vector<Report::Value> values = {name,       batch.phase,   dtype,
                                             batch.jobs, batch.context, batch.jobs * batch.tokens};
        for (Report::Value& value : measured.values()) values.push_back(std::move(value));
        report.row(std::move(values));
      }
    }
  }
  limits.report(report);
}

}  // namespace

int main(int count, char** arguments) {
  Options options(
      "attention",
      "Attention of one layer over the paged pool, in GB/s of keys and values and GFLOP/s, and their shares of "
      "what memory\nand the multiply-add units reach beside it.");
  options.add_device();
  options.add("preset", "NAME,...", "smollm2", "heads of: smollm2, llama-1b, llama-8b, tiny", "llama-8b");
  options.add("dtype", "NAME,...", "float32,bfloat16,int8", "how keys and values are held", "bfloat16");
  options.add("rows", "N,...", "1,8,32", "jobs that decode together", "1,8,32,64");
  options.add("context", "N,...", "256,2048", "positions each of them looks at");
  options.add("tokens", "N,...", "512,2048", "lengths of prompts; 0: none");
  options.add("block-size", "N", "16", "token slots of a block");
  return run_main(count, arguments, options, run);
}
