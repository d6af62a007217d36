// Prompts through the runtime, in chunks: the whole decoder, and one token sampled at the end.
#include <algorithm>

#include "bench/limits.h"
#include "bench/random_model.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

constexpr int64_t kBlockSize = 16;

std::vector<BatchPlan> prompt(const ModelSpec& spec, int64_t length, int64_t chunk) {
  const auto tokens = random_tokens(length, spec.vocab_size);
  std::vector<BatchPlan> plans;
  for (int64_t start = 0; start < length; start += chunk) {
    const int64_t end = std::min(length, start + chunk);
    BatchPlan plan;
    plan.rows.push_back({0, static_cast<int32_t>(start), static_cast<int32_t>(end - start), end == length});
    plan.tokens.assign(tokens.begin() + start, tokens.begin() + end);
    plans.push_back(std::move(plan));
  }
  return plans;
}

void run(const Options& options, Report& report) {
  const auto lengths = options.integers("tokens", 1, 8192);
  const int64_t chunk = options.integer("chunk", 1, 8192);
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());

  const int64_t blocks = ceil_div(longest, kBlockSize);
  const std::vector<Candidate> models = candidates(options, blocks * kBlockSize);

  std::vector<std::unique_ptr<Runtime>> runtimes;
  std::vector<Measured> measured;
  for (const Candidate& model : models) {
    runtimes.push_back(random_model(model, {.block_size = kBlockSize,
                                            .num_blocks = blocks,
                                            .max_tokens = chunk,
                                            .threads = options.threads(),
                                            .device = options.device()}));
    std::vector<BatchPlan> first = prompt(model.spec, std::min(longest, chunk), chunk);  // warms up
    open_slot(first.front(), 0, longest, 0, blocks);
    run_plans(*runtimes.back(), std::move(first));
    for (const int64_t length : lengths) {
      const auto tokens = static_cast<double>(length);
      measured.emplace_back(Work{static_cast<double>(ceil_div(length, chunk)) * model.cost.weight_bytes +
                                     tokens * model.cost.kv_bytes_per_token,
                                 2 * (tokens * model.cost.layer_parameters + model.cost.head_parameters) +
                                     tokens * (tokens + 1) / 2 * model.cost.flops_per_pair,
                                 arithmetic_of(model.format)});
    }
  }
  Limits limits(options, report.isa());
  for (int round = 0; round < options.repeats(); ++round) {
    for (size_t i = 0; i < models.size(); ++i) {
      for (size_t j = 0; j < lengths.size(); ++j) {
        measured[i * lengths.size() + j].sample(limits, [&] {
          std::vector<BatchPlan> plans = prompt(models[i].spec, lengths[j], chunk);
          return seconds_of([&] { run_plans(*runtimes[i], std::move(plans)); });
        });
      }
    }
  }

  report.fact("chunk", chunk);
  std::vector<Report::Column> columns = {{"preset", "model"},
                                         {"weights", "weights"},
                                         {"dtype", "dtype"},
                                         {"tokens", "tokens"},
                                         {"tokens_per_second", "tokens/s", 1}};
  for (Report::Column& column : Measured::columns(limits)) columns.push_back(std::move(column));
  report.columns(columns);
  for (size_t i = 0; i < models.size(); ++i) {
    for (size_t j = 0; j < lengths.size(); ++j) {
      const Measured& sample = measured[i * lengths.size() + j];
      std::vector<Report::Value> values = {models[i].preset, models[i].weights, models[i].dtype, lengths[j],
                                           static_cast<double>(lengths[j]) / sample.seconds()};
      for (Report::Value& value : sample.values()) values.push_back(std::move(value));
      report.row(std::move(values));
    }
  }
  limits.report(report);
}

}  // namespace

int main(int count, char** arguments) {
  Options options("prefill",
                  "Prompts of a model with random weights through the runtime, in tokens/s, GB/s of weights and KV and "
                  "GFLOP/s, and\ntheir shares of what memory and the multiply-add units reach beside them.");
  add_model_options(options, {.host_only = false});
  options.add("tokens", "N,...", "512,2048", "lengths of prompts");
  options.add("chunk", "N", "512", "tokens of an iteration, as --max-num-batched-tokens", "2048");
  return run_main(count, arguments, options, run);
}
