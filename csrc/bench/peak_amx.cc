// Tile products, for machines whose kernels are named "amx". CMakeLists.txt sets the compiler flags.
#include <immintrin.h>

#include "bench/peak_kernels.h"

namespace fastserve::bench {

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles of its own, full ones, for as long as it lives: the calling thread also runs kernels, which have theirs. GCC 12
// does not know that these instructions touch all 64 bytes; hence the barriers.
class OwnTiles {
 public:
  OwnTiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    const TileConfig full;
    asm volatile("ldtilecfg %0" ::"m"(full) : "memory");
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
  }
  ~OwnTiles() { asm volatile("ldtilecfg %0" ::"m"(before_) : "memory"); }
  OwnTiles(const OwnTiles&) = delete;
  OwnTiles& operator=(const OwnTiles&) = delete;

 private:
  TileConfig before_;
};

// Two by two accumulators, as many as hide a product's latency. Permission to use tiles is the process's, and the
// kernels have asked for it before anything is called "amx".
int64_t run_bfloat16_tiles(int64_t steps) {
  const OwnTiles tiles;
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return steps * 4 * 2 * 16 * 16 * 32;
}

int64_t run_int8_tiles(int64_t steps) {
  const OwnTiles tiles;
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  return steps * 4 * 2 * 16 * 16 * 64;
}

}  // namespace

extern const Peak kAmxPeak;
const Peak kAmxPeak = {"amx", read_words, {run_float32, run_bfloat16_tiles, run_int8_tiles}};

}  // namespace fastserve::bench
