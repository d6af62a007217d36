// Iterations of decodes through the runtime: the whole decoder, its head and greedy sampling.
#include <algorithm>
#include <limits>

#include "bench/limits.h"
#include "bench/random_model.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

constexpr int64_t kBlockSize = 16;

// Seconds of an iteration, over `steps` of them that start at the same position every time.
double decode(Runtime& runtime, int64_t jobs, int64_t context, int64_t steps) {
  std::vector<BatchPlan> plans(steps);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t job = 0; job < jobs; ++job) {
      plans[step].rows.push_back({static_cast<int32_t>(job), static_cast<int32_t>(context + step), 1, 1});
      plans[step].tokens.push_back(-1);
    }
  }
  return seconds_of([&] { run_plans(runtime, std::move(plans)); }) / static_cast<double>(steps);
}

// Of the device's time from a batch's start to the next one's, the percentage between the end of its kernels and that.
double idle_percent(const std::vector<BatchSpan>& spans) {
  if (spans.size() < 2) return std::numeric_limits<double>::quiet_NaN();
  double idle = 0;
  for (size_t i = 1; i < spans.size(); ++i) idle += spans[i].begin - spans[i - 1].end;
  return 100 * idle / (spans.back().begin - spans.front().begin);
}

void run(const Options& options, Report& report) {
  const auto rows = options.integers("rows", 1, 1024);
  const int64_t context = options.integer("context", 1, 8000), steps = options.integer("steps", 1, 128);
  const int64_t most_rows = *std::max_element(rows.begin(), rows.end());
  const int64_t blocks = ceil_div(context + steps, kBlockSize);

  const std::vector<Candidate> models = candidates(options, most_rows * blocks * kBlockSize);

  std::vector<std::unique_ptr<Runtime>> runtimes;
  for (const Candidate& model : models) {
    runtimes.push_back(random_model(model, {.block_size = kBlockSize,
                                            .num_blocks = most_rows * blocks,
                                            .max_tokens = std::max(kPromptTokens, most_rows),
                                            .threads = options.threads(),
                                            .device = options.device()}));
    run_plans(*runtimes.back(), prompt_plans(model.spec, most_rows, context, blocks));
  }
  Limits limits(options, report.isa());
  std::vector<Measured> measured;
  std::vector<Samples> idle(models.size() * rows.size());
  for (const Candidate& model : models) {
    for (const int64_t jobs : rows) {
      const auto count = static_cast<double>(jobs);
      const double seen = static_cast<double>(context) + (static_cast<double>(steps) + 1) / 2;
      measured.emplace_back(Work{
          model.cost.weight_bytes + count * seen * model.cost.kv_bytes_per_token,
          count * (2 * (model.cost.layer_parameters + model.cost.head_parameters) + seen * model.cost.flops_per_pair),
          arithmetic_of(model.format)});
    }
  }
  for (int round = -1; round < options.repeats(); ++round) {  // the first one warms up
    for (size_t i = 0; i < models.size(); ++i) {
      for (size_t j = 0; j < rows.size(); ++j) {
        const auto body = [&] { return decode(*runtimes[i], rows[j], context, round < 0 ? 1 : steps); };
        if (round < 0) {
          body();
        } else if (limits.probe() == nullptr) {
          measured[i * rows.size() + j].sample(limits, body);
        } else {
          measured[i * rows.size() + j].sample(limits, [&] {
            limits.probe()->time_batches(steps);
            const double seconds = body();
            idle[i * rows.size() + j].push_back(idle_percent(limits.probe()->take_times()));
            return seconds;
          });
        }
      }
    }
  }

  report.fact("context", context);
  report.fact("steps", steps);
  std::vector<Report::Column> columns = {{"preset", "model"},
                                         {"weights", "weights"},
                                         {"dtype", "dtype"},
                                         {"rows", "rows"},
                                         {"tokens_per_second", "tokens/s", 1}};
  for (Report::Column& column : Measured::columns(limits)) columns.push_back(std::move(column));
  if (limits.probe() != nullptr) columns.push_back({"idle_percent", "% idle", 2});
  report.columns(columns);
  for (size_t i = 0; i < models.size(); ++i) {
    for (size_t j = 0; j < rows.size(); ++j) {
      const Measured& sample = measured[i * rows.size() + j];
      std::vector<Report::Value> values = {models[i].preset, models[i].weights, models[i].dtype, rows[j],
                                           static_cast<double>(rows[j]) / sample.seconds()};
      for (Report::Value& value : sample.values()) values.push_back(std::move(value));
      if (limits.probe() != nullptr) values.emplace_back(median(idle[i * rows.size() + j]));
      report.row(std::move(values));
    }
  }
  limits.report(report);
}

}  // namespace

int main(int count, char** arguments) {
  Options options("decode",
                  "Decodes of a model with random weights through the runtime, in tokens/s, GB/s of weights and KV and "
                  "GFLOP/s, and\ntheir shares of what memory and the multiply-add units reach beside them.");
  add_model_options(options, {.host_only = false});
  options.add("rows", "N,...", "1,8,32", "jobs that decode together", "1,8,32,64");
  options.add("context", "N", "128",
              "positions each of them has; their prompts run first, which takes a while for llama-1b");
  options.add("steps", "N", "16", "iterations of a sample", "64");
  return run_main(count, arguments, options, run);
}
