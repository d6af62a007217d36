// What ranks of one host pay to tell each other something: sums, broadcasts and messages over shared memory, and what
// an iteration takes of it, a plan to all ranks and their word on it back.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <limits>

#include "bench/harness.h"
#include "comm/acknowledgement.h"
#include "comm/plan_wire.h"
#include "comm/shared_memory.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

struct Case {
  std::string operation;
  int64_t rows, bytes;
  std::function<void()> body;  // what each rank does
  bool parked;                 // whether the others have waited for long when it begins
  Samples seconds;
};

// An iteration that decodes `rows` jobs, each of which gets a block in it.
BatchPlan decode_plan_of(int64_t rows) {
  BatchPlan plan;
  for (int32_t i = 0; i < rows; ++i) {
    plan.rows.push_back({i, 1000 + i, 1, 1});
    plan.tokens.push_back(-1);
    plan.table.push_back({i, 63, i});
  }
  return plan;
}

// Everything that is measured, in the same order on every rank.
class Cases {
 public:
  Cases(Communicator& world, const Options& options) : world_(world) {
    const auto widths = options.integers("hidden", 1, 1 << 20), all_rows = options.integers("rows", 1, 1 << 16);
    for (const int64_t rows : all_rows) {
      for (const int64_t width : widths) {
        const auto bytes = static_cast<size_t>(rows * width) * sizeof(float);
        if (values_.size() < bytes / sizeof(float)) values_.resize(bytes / sizeof(float));
        add("all_reduce", rows, bytes, [this, bytes] { world_.all_reduce_sum(floats(bytes)); });
        add("broadcast", rows, bytes, [this, bytes] {
          world_.broadcast(std::as_writable_bytes(floats(bytes)), 0);
          world_.barrier();
        });
        add("message", rows, bytes, [this, bytes] {  // there and back
          const auto data = std::as_writable_bytes(floats(bytes));
          if (world_.rank() == 0) world_.wait(*world_.send(data, 1));
          if (world_.rank() <= 1) world_.wait(*world_.receive(data, 1 - world_.rank()));
          if (world_.rank() == 1) world_.wait(*world_.send(data, 0));
        });
      }
      plans_.push_back(decode_plan_of(rows));
    }
    for (const bool parked : {false, true}) {
      for (size_t i = 0; i < all_rows.size(); ++i) {
        const auto bytes = static_cast<int64_t>(encode_plan(plans_[i]).size());
        add(parked ? "plan, parked" : "plan", all_rows[i], bytes, [this, i] { iterate(plans_[i]); }, parked);
      }
    }
    add("barrier", 0, 0, [this] { world_.barrier(); });
  }

  std::vector<Case>& all() { return cases_; }

 private:
  void add(const std::string& operation, int64_t rows, int64_t bytes, std::function<void()> body, bool parked = false) {
    cases_.push_back({operation, rows, bytes, std::move(body), parked, {}});
  }
  std::span<float> floats(size_t bytes) { return std::span(values_).first(bytes / sizeof(float)); }

  void iterate(const BatchPlan& plan) {
    BatchPlan received;
    broadcast_plan(world_, world_.rank() == 0 ? const_cast<BatchPlan&>(plan) : received, 0);
    const Acknowledgement own{world_.rank() == 0 ? plan.plan_id : received.plan_id, 0.01, {}};
    if (world_.rank() == 0) {
      acknowledgements_.gather(world_, own);
    } else {
      send_acknowledgement(world_, own);
    }
  }

  Communicator& world_;
  std::vector<float> values_;
  std::vector<BatchPlan> plans_;
  Acknowledgements acknowledgements_;
  std::vector<Case> cases_;
};

// Seconds of one of `count` in a row.
double measure(Communicator& world, const Case& test, int64_t count) {
  constexpr double kParkedAfter = 200e-6;
  double seconds = 0;
  world.barrier();
  for (int64_t i = 0; i < (test.parked ? count : 0); ++i) {
    const auto begin = std::chrono::steady_clock::now();
    while (world.rank() == 0 &&
           std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < kParkedAfter) {
    }
    seconds += seconds_of(test.body);
  }
  if (!test.parked) {
    seconds = seconds_of([&] {
      for (int64_t i = 0; i < count; ++i) test.body();
    });
  }
  return seconds / static_cast<double>(count);
}

void work(Communicator& world, const Options& options, std::vector<Case>& cases) {
  const int64_t count = options.integer("count", 1, 1 << 30);
  for (Case& test : cases) measure(world, test, std::min<int64_t>(count, 50));  // memory is touched, ranks are awake
  for (int round = 0; round < options.repeats(); ++round) {
    for (Case& test : cases) test.seconds.push_back(measure(world, test, count));
  }
}

void run(const Options& options, Report& report) {
  const auto ranks = static_cast<int>(options.integer("ranks", 2, kMaxSharedRanks));
  const auto memory = make_shared_memory(ranks);
  const std::string path = memory->path();
  const auto join = [&](int rank) { return join_shared_memory(path, rank, ranks, this_member(rank, ""), {60.0, {}}); };
  std::vector<pid_t> others;
  for (int rank = 1; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child < 0) throw std::runtime_error("the system refuses a process");
    if (child > 0) {
      others.push_back(child);
      continue;
    }
    int status = 0;
    try {
      const auto world = join(rank);
      Cases cases(*world, options);
      work(*world, options, cases.all());
      world->close();
    } catch (const std::exception&) {
      status = 1;  // rank 0 is told why
    }
    _exit(status);
  }

  report.fact("ranks", int64_t{ranks});
  report.columns({{"operation", "operation"},
                  {"rows", "rows"},
                  {"bytes", "bytes"},
                  {"seconds", ""},
                  {"microseconds", "us", 2},
                  {"gb_s", "GB/s", 2}});
  const auto world = join(0);
  Cases cases(*world, options);
  work(*world, options, cases.all());
  world->close();
  for (const pid_t child : others) waitpid(child, nullptr, 0);
  for (const Case& test : cases.all()) {
    const double seconds = median(test.seconds);
    report.row(
        {test.operation, test.rows, test.bytes, seconds, seconds * 1e6,
         test.bytes > 0 ? static_cast<double>(test.bytes) / seconds / 1e9 : std::numeric_limits<double>::quiet_NaN()});
  }
}

}  // namespace

int main(int count, char** arguments) {
  Options options(
      "comm",
      "What processes of one host pay to tell each other something over shared memory: sums in rank order; "
      "a broadcast and\na barrier; a message there and back; a plan to all ranks and their acknowledgements "
      "to rank 0.");
  options.add("ranks", "N", "2", "processes");
  options.add("hidden", "N,...", "576,4096", "float32 values of a row");
  options.add("rows", "N,...", "1,64", "rows of a batch");
  options.add("count", "N", "1000", "of each in one measurement");
  return run_main(count, arguments, options, run);
}
