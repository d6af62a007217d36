// Decodes of one model by one process, and by processes that share its matrices or its layers, with as many threads in
// all.
#include <algorithm>
#include <limits>
#include <thread>

#include "bench/layout.h"
#include "bench/limits.h"
#include "bench/random_model.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

using Clock = std::chrono::steady_clock;

constexpr int64_t kBlockSize = 16;
// What a layout should reach where each thread has a core: of one process; and, for each rank, of one batch at a time.
constexpr double kTensorGoal = 0.9, kPipelineGoal = 0.85;
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// Seconds from one result to the next, once the first is there: how long a pipeline takes to fill is not of it.
template <class Executor>
double seconds_per_plan(Executor& executor, std::vector<BatchPlan> plans, size_t in_flight) {
  Clock::time_point first, last;
  for (size_t taken = 0, submitted = 0; taken < plans.size(); ++taken) {
    while (submitted < std::min(plans.size(), taken + in_flight)) executor.submit(std::move(plans[submitted++]));
    check_result(*executor.poll(-1));
    last = Clock::now();
    if (taken == 0) first = last;
  }
  return std::chrono::duration<double>(last - first).count() / static_cast<double>(plans.size() - 1);
}

// `steps` decodes of each of `batches` batches in turn, of `jobs` jobs each, that start at the same position every
// time.
std::vector<BatchPlan> decodes(int64_t jobs, int64_t batches, int64_t context, int64_t steps) {
  std::vector<BatchPlan> plans;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t batch = 0; batch < batches; ++batch) {
      BatchPlan& plan = plans.emplace_back();
      plan.plan_id = static_cast<int64_t>(plans.size());
      for (int64_t job = batch * jobs; job < (batch + 1) * jobs; ++job) {
        plan.rows.push_back({static_cast<int32_t>(job), static_cast<int32_t>(context + step), 1, 1});
        plan.tokens.push_back(-1);
      }
    }
  }
  return plans;
}

// A way to run a batch, and what it is measured against.
struct Way {
  std::string layout;
  int64_t in_flight, batches;
  std::function<double(std::vector<BatchPlan>, size_t)> run;  // seconds of a plan
  int against = -1;                                           // another way; -1: none
  double goal = kNone;                                        // of the ratio of their speeds
};

struct Measurement {
  Samples seconds, ratios;
};

void run(const Options& options, Report& report) {
  const auto ranks = static_cast<int>(options.integer("ranks", 2, 64));
  const int given = options.threads();
  const int threads = given > 0 ? given : std::max(ranks, static_cast<int>(std::thread::hardware_concurrency()));
  if (threads % ranks != 0) {
    throw UsageError("--threads (" + std::to_string(threads) + ") must be a multiple of --ranks (" +
                     std::to_string(ranks) + "), each of which has as many");
  }
  const auto rows = options.integers("rows", 1, 1024);
  const int64_t context = options.integer("context", 1, kPromptTokens), steps = options.integer("steps", 2, 128);
  const int64_t jobs = *std::max_element(rows.begin(), rows.end()) * ranks;
  const int64_t blocks = ceil_div(context + steps, kBlockSize);
  const std::vector<Candidate> models = candidates(options, jobs * blocks * kBlockSize, 3);
  if (models.size() != 1) throw UsageError("one --preset with one kind of --weights at a time");
  const Candidate& model = models.front();
  RuntimeSize size{.block_size = kBlockSize,
                   .num_blocks = jobs * blocks,
                   .max_tokens = std::max(kPromptTokens, jobs),
                   .threads = threads / ranks};

  const Layout matrices{.tensor = ranks, .pipeline = 1}, layers{.tensor = 1, .pipeline = ranks};
  for (const Layout& layout : {matrices, layers}) part_of(model, layout, 0);
  // Processes first: this one has no threads yet.
  Processes tensor(model, matrices, size), pipeline(model, layers, size);
  tensor.connect();
  pipeline.connect();
  tensor.load();
  pipeline.load();
  size.threads = threads;
  const std::unique_ptr<Runtime> alone = random_model(model, size);
  const auto by = [](auto& executor) {
    return [&executor](std::vector<BatchPlan> plans, size_t in_flight) {
      return seconds_per_plan(executor, std::move(plans), in_flight);
    };
  };
  const std::string count = std::to_string(ranks);
  const bool crowded = threads > static_cast<int>(std::thread::hardware_concurrency());
  const double tensor_goal = crowded ? kNone : kTensorGoal, pipeline_goal = crowded ? kNone : kPipelineGoal * ranks;
  const std::vector<Way> ways = {
      {.layout = "1 process", .in_flight = 2, .batches = 1, .run = by(*alone)},
      {.layout = "TP=" + count, .in_flight = 2, .batches = 1, .run = by(tensor), .against = 0, .goal = tensor_goal},
      {.layout = "PP=" + count, .in_flight = 1, .batches = ranks, .run = by(pipeline)},
      {.layout = "PP=" + count,
       .in_flight = ranks,
       .batches = ranks,
       .run = by(pipeline),
       .against = 2,
       .goal = pipeline_goal},
  };
  for (const Way* way : {&ways[0], &ways[1], &ways[2]}) way->run(prompt_plans(model.spec, jobs, context, blocks), 1);

  Limits one(options, report.isa(), threads / ranks), all(options, report.isa(), threads);
  Samples one_reads, all_read, one_computes, all_compute;
  std::vector<std::vector<Measurement>> measured(rows.size(), std::vector<Measurement>(ways.size()));
  const Arithmetic arithmetic = arithmetic_of(model.format);
  for (int round = -1; round < options.repeats(); ++round) {  // the first one warms up
    for (size_t i = 0; i < rows.size(); ++i) {
      one_reads.push_back(one.read());
      all_read.push_back(all.read());
      one_computes.push_back(one.compute(arithmetic));
      all_compute.push_back(all.compute(arithmetic));
      std::vector<double> seconds;
      for (const Way& way : ways) {
        const auto at_once = static_cast<size_t>(way.in_flight);
        seconds.push_back(way.run(decodes(rows[i], way.batches, context, round < 0 ? 2 : steps), at_once));
        if (round < 0) continue;
        Measurement& each = measured[i][&way - ways.data()];
        each.seconds.push_back(seconds.back());
        if (way.against >= 0) each.ratios.push_back(seconds[way.against] / seconds.back());
      }
    }
  }
  tensor.close();
  pipeline.close();

  report.fact("preset", model.preset);
  report.fact("weights", model.weights);
  report.fact("dtype", model.dtype);
  report.fact("ranks", int64_t{ranks});
  report.fact("threads", int64_t{threads});
  report.fact("context", context);
  report.fact("steps", steps);
  report.columns({{"layout", "layout"},
                  {"in_flight", "in flight"},
                  {"rows", "rows"},
                  {"seconds", ""},
                  {"milliseconds", "ms", 2},
                  {"tokens_per_second", "tokens/s", 1},
                  {"against", "against"},
                  {"ratio", "ratio", 2},
                  {"goal", "goal", 2}});
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < ways.size(); ++j) {
      const Way& way = ways[j];
      const double seconds = median(measured[i][j].seconds);
      const std::string against = way.against < 0    ? "-"
                                  : way.against == 0 ? ways[0].layout
                                                     : std::to_string(ways[way.against].in_flight) + " in flight";
      report.row({way.layout, way.in_flight, rows[i], seconds, 1e3 * seconds, static_cast<double>(rows[i]) / seconds,
                  against, median(measured[i][j].ratios), way.goal});
    }
  }
  report.fact("rank_read_gb_s", median(one_reads) / 1e9);
  report.fact("all_read_gb_s", median(all_read) / 1e9);
  report.fact("rank_gflop_s", median(one_computes) / 1e9);
  report.fact("all_gflop_s", median(all_compute) / 1e9);
  std::printf("limits, %d and %d threads: read %.1f and %.1f GB/s, %.0f and %.0f GFLOP/s\n", one.threads(),
              all.threads(), median(one_reads) / 1e9, median(all_read) / 1e9, median(one_computes) / 1e9,
              median(all_compute) / 1e9);
}

}  // namespace

int main(int count, char** arguments) {
  Options options(
      "layouts",
      "Decodes of a model with random weights by one process, by processes that share its matrices (TP) and "
      "by processes that\nshare its layers (PP), with one batch in flight and with one a stage. In turn, and "
      "medians, of the rounds' ratios too.\n--threads are of all together.");
  add_model_options(options, {.presets = "llama-1b", .weights = "bfloat16", .gigabytes = "12"});
  options.add("ranks", "N", "2", "processes of a layout");
  options.add("rows", "N,...", "1,32", "jobs of a batch");
  options.add("context", "N", "16", "positions each of them has; their prompts run first");
  options.add("steps", "N", "8", "iterations of each batch in a sample");
  return run_main(count, arguments, options, run);
}
