// Copies of KV blocks between the tiers, one stream a direction, beside plain copies of as many bytes by as many
// threads.
#include <cstring>
#include <numeric>
#include <thread>

#include "backend/device.h"
#include "bench/limits.h"
#include "bench/random_model.h"
#include "runtime/copy_engine.h"
#include "runtime/runtime.h"

namespace {

using namespace fastserve;
using namespace fastserve::bench;

struct Case {
  const char* direction;
  const char* blocks;  // where the blocks of a copy lie
  int64_t blocks_per_copy;
  Samples seconds, percent, read_percent;
};

// Two arenas of `blocks` blocks each, half of them for either direction.
class Tiers {
 public:
  Tiers(Backend& backend, const KvShape& shape, int64_t blocks)
      : pool_(backend, shape, blocks, blocks), engine_(pool_, 0), blocks_(blocks) {
    for (const Tier tier : {Tier::kDevice, Tier::kHost}) std::memset(pool_.block(tier, 0), 1, blocks * block_bytes());
  }

  int64_t block_bytes() const { return pool_.block_bytes(); }
  int64_t half() const { return blocks_ / 2; }
  static int streams(const Case& test) { return std::string(test.direction) == "both" ? 2 : 1; }

  // Seconds in which each direction of the case moves its half of the blocks, through the copy engine.
  double copy(const Case& test) {
    std::vector<CopyRow> rows;
    std::vector<int32_t> order(half());
    std::iota(order.begin(), order.end(), 0);
    if (std::string(test.blocks) == "apart") {  // no two neighbours stay neighbours
      for (int64_t i = 0; i < half(); ++i) order[i] = static_cast<int32_t>(i % 2 == 0 ? i / 2 : half() - 1 - i / 2);
    }
    int32_t copies = 0;
    for (const int32_t direction : {kOffload, kUpload}) {
      if (std::string(test.direction) == (direction == kOffload ? "upload" : "offload")) continue;
      const auto base = static_cast<int32_t>(direction == kOffload ? 0 : half());
      for (int64_t i = 0; i < half(); ++i) {
        rows.push_back({static_cast<int32_t>(copies + i / test.blocks_per_copy), direction,
                        base + static_cast<int32_t>(i), base + order[i]});
      }
      copies += static_cast<int32_t>(ceil_div(half(), test.blocks_per_copy));
    }
    return seconds_of([&] {
      engine_.submit(rows);
      for (int32_t done = 0; done < copies;) done += static_cast<int32_t>(engine_.take(true).size());
    });
  }

  // The same bytes, each direction one memcpy.
  double plain(const Case& test) {
    const auto move = [&](Tier from, Tier to, int64_t base) {
      std::memcpy(pool_.block(to, base), pool_.block(from, base), half() * block_bytes());
    };
    const std::string direction = test.direction;
    return seconds_of([&] {
      std::thread other;
      if (direction != "offload") other = std::thread([&] { move(Tier::kHost, Tier::kDevice, half()); });
      if (direction != "upload") move(Tier::kDevice, Tier::kHost, 0);
      if (other.joinable()) other.join();
    });
  }

 private:
  KvPool pool_;
  CopyEngine engine_;
  int64_t blocks_;
};

void run(const Options& options, Report& report) {
  const auto presets = options.choices("preset", preset_names());
  const auto dtypes = options.choices("dtype", dtype_names());
  const auto block_size = options.integer("block-size", 1, 4096);
  const auto sizes = options.integers("blocks", 1, 1 << 20);
  Limits limits(options, report.isa());

  const auto backend = make_backend("cpu", DType::kFloat32, options.threads());
  report.columns({{"preset", "model"},
                  {"dtype", "dtype"},
                  {"direction", "direction"},
                  {"blocks", "blocks are"},
                  {"blocks_per_copy", "a copy"},
                  {"block_kb", "KB/block", 0},
                  {"seconds", ""},
                  {"copy_milliseconds", "ms/copy", 3},
                  {"gb_s", "GB/s", 1},
                  {"memcpy_percent", "% of memcpy", 1},
                  {"read_percent", "% of read", 1}});
  for (const std::string& name : presets) {
    for (const std::string& dtype : dtypes) {
      const KvShape shape = Runtime::kv_shape(preset(name), parse_kv_format(dtype), block_size);
      const int64_t blocks = 2 * ceil_div(options.cold_bytes() / 2, backend->block_bytes(shape));
      Tiers tiers(*backend, shape, blocks);
      std::vector<Case> cases;
      for (const char* direction : {"offload", "upload", "both"}) {
        for (const char* where : {"together", "apart"}) {
          for (const int64_t size : sizes)
            cases.push_back({direction, where, std::min(size, tiers.half()), {}, {}, {}});
        }
      }
      const auto moved = static_cast<double>(tiers.half() * tiers.block_bytes());
      for (int round = 0; round < options.repeats(); ++round) {
        for (Case& test : cases) {
          const double read = limits.read(), plain = tiers.plain(test), seconds = tiers.copy(test);
          const double bytes = moved * Tiers::streams(test);
          test.seconds.push_back(seconds);
          test.percent.push_back(100 * plain / seconds);
          test.read_percent.push_back(100 * 2 * bytes / seconds / read);  // each byte is read and written
        }
      }
      for (const Case& test : cases) {
        const double seconds = median(test.seconds);
        const auto copies = static_cast<double>(ceil_div(tiers.half(), test.blocks_per_copy));
        report.row({name, dtype, test.direction, test.blocks, test.blocks_per_copy,
                    static_cast<double>(tiers.block_bytes()) / 1e3, seconds, 1e3 * seconds / copies,
                    moved * Tiers::streams(test) / seconds / 1e9, median(test.percent), median(test.read_percent)});
      }
    }
  }
  limits.report(report);
}

}  // namespace

int main(int count, char** arguments) {
  Options options(
      "swap",
      "Copies of KV blocks between device and host, in GB/s (each byte counted once), and their shares of plain "
      "copies by as\nmany threads, and, reads and writes counted, of what memory reads beside them.");
  options.add("preset", "NAME,...", "smollm2", "blocks of: smollm2, llama-1b");
  options.add("dtype", "NAME,...", "bfloat16", "of keys and values: float32, bfloat16");
  options.add("block-size", "N", "16", "token slots of a block");
  options.add("blocks", "N,...", "1,64", "blocks of a copy");
  return run_main(count, arguments, options, run);
}
