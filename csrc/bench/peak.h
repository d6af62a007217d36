// One instruction set's own loads and multiply-adds, each a translation unit by itself: peak_*.cc.
#pragma once

#include <cstdint>

namespace fastserve::bench {

struct Peak {
  const char* isa;
  // The sum of `bytes` bytes, a multiple of 1024, taken as words.
  uint64_t (*read)(const void* data, int64_t bytes);
  // By Arithmetic: runs `steps` rounds of independent multiply-adds and returns how many operations those were, two
  // each.
  int64_t (*run[3])(int64_t steps);
};

}  // namespace fastserve::bench
