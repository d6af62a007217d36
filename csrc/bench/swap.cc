// Copies of KV blocks between the tiers, one stream a direction, beside plain copies of as many bytes: by as many
// threads, or, to and from a device, of pinned memory. And what they take from iterations beside them.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "backend/device.h"
#include "bench/decode_beside_copies.h"
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
    std::memset(pool_.block(Tier::kHost, 0), 1, blocks * block_bytes());
    backend.upload(pool_.block(Tier::kHost, 0), pool_.block(Tier::kDevice, 0), blocks * block_bytes());
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

  // The same bytes, each direction one memcpy, or by the device's plain copies.
  double plain(const Case& test, Limits& limits) {
    if (limits.probe() != nullptr) {
      const auto bytes = static_cast<double>(streams(test) * half() * block_bytes());
      return bytes / limits.transfer(streams(test) == 2                         ? DeviceProbe::Transfer::kBoth
                                     : std::string(test.direction) == "offload" ? DeviceProbe::Transfer::kToHost
                                                                                : DeviceProbe::Transfer::kToDevice);
    }
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

void report_slowdown(const Options& options, Report& report, const std::string& name, const std::string& dtype) {
  const KvFormat kv = parse_kv_format(dtype);
  const WeightFormat format = kv == KvFormat::kFloat32 ? WeightFormat::kFloat32 : WeightFormat::kBFloat16;
  const std::string weights = kv == KvFormat::kFloat32 ? "float32" : "bfloat16";
  DecodeBesideCopies decodes({name, weights, dtype, format, kv, preset(name), cost_of(preset(name), format, kv)},
                             {.jobs = options.integer("rows", 0, 1024),
                              .context = options.integer("context", 1, 8000),
                              .steps = options.integer("steps", 1, 128),
                              .bytes = options.integer("beside", 1, 1 << 20) << 20,
                              .block_size = options.integer("block-size", 1, 4096)},
                             options);
  Samples alone, beside, slower, to_host, to_device;
  decodes.alone();  // warms up
  for (int round = 0; round < options.repeats(); ++round) {
    const auto without = decodes.alone(), with = decodes.beside();
    alone.push_back(without.seconds);
    beside.push_back(with.seconds);
    slower.push_back(100 * (with.seconds / without.seconds - 1));
    to_host.push_back(with.to_host);
    to_device.push_back(with.to_device);
  }
  report.fact("decode_rows", options.integer("rows", 0, 1024));
  report.fact("decode_seconds", median(alone));
  report.fact("decode_seconds_beside_copies", median(beside));
  report.fact("decode_slower_percent", median(slower));
  report.fact("beside_offload_gb_s", median(to_host) / 1e9);
  report.fact("beside_upload_gb_s", median(to_device) / 1e9);
  std::printf("an iteration of %lld decodes: %.3f ms, and %.3f ms (%+.1f %%) beside %.1f GB/s out and %.1f GB/s in\n",
              static_cast<long long>(options.integer("rows", 0, 1024)), 1e3 * median(alone), 1e3 * median(beside),
              median(slower), median(to_host) / 1e9, median(to_device) / 1e9);
}

void run(const Options& options, Report& report) {
  const auto presets = options.choices("preset", preset_names());
  const auto dtypes = options.choices("dtype", dtype_names());
  const auto block_size = options.integer("block-size", 1, 4096);
  const auto sizes = options.integers("blocks", 1, 1 << 20);
  const bool slowdown = options.integer("rows", 0, 1024) > 0;
  if (slowdown && presets.size() * dtypes.size() > 1) throw UsageError("--rows is for one --preset and one --dtype");
  Limits limits(options, report.isa());
  report.columns({{"preset", "model"},
                  {"dtype", "dtype"},
                  {"direction", "direction"},
                  {"blocks", "blocks are"},
                  {"blocks_per_copy", "a copy"},
                  {"block_kb", "KB/block", 0},
                  {"seconds", ""},
                  {"copy_milliseconds", "ms/copy", 3},
                  {"gb_s", "GB/s", 1},
                  {"memcpy_percent", options.on_host() ? "% of memcpy" : "% of pinned", 1},
                  {"read_percent", options.on_host() ? "% of read" : "", 1}});
  for (const std::string& name : presets) {
    for (const std::string& dtype : dtypes) {
      const DType computed = dtype == "float32" || options.on_host() ? DType::kFloat32 : DType::kBFloat16;
      const auto backend = make_backend(options.device(), computed, options.threads());
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
          const double read = options.on_host() ? limits.read() : std::numeric_limits<double>::quiet_NaN();
          const double plain = tiers.plain(test, limits), seconds = tiers.copy(test);
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
  if (slowdown) report_slowdown(options, report, presets.front(), dtypes.front());
}

}  // namespace

int main(int count, char** arguments) {
  Options options(
      "swap",
      "Copies of KV blocks between device and host, in GB/s (each byte counted once), and their shares of plain "
      "copies by as\nmany threads, and, reads and writes counted, of what memory reads beside them; or, to and from a "
      "device, of "
      "plain copies\nof pinned memory.");
  options.add_device();
  options.add("preset", "NAME,...", "smollm2", "blocks of: smollm2, llama-1b, llama-8b, tiny", "llama-8b");
  options.add("dtype", "NAME,...", "bfloat16", "of keys and values: float32, bfloat16");
  options.add("block-size", "N", "16", "token slots of a block");
  options.add("blocks", "N,...", "1,64", "blocks of a copy");
  options.add("rows", "N", "0", "also decode so many jobs while copies go both ways; 0: do not", "32");
  options.add("context", "N", "512", "positions each of them has");
  options.add("steps", "N", "64", "iterations of a sample");
  options.add("beside", "MB", "1024", "of copies under way beside them, each direction");
  return run_main(count, arguments, options, run);
}
