#include "machine/matrix.h"

#include <cstring>

namespace simt {
namespace {

struct Multiply {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float widen(Element element, uint32_t bits) {
  return element == Element::kBf16 ? std::bit_cast<float>(bits << 16)
                                   : fastserve::half_to_float(static_cast<uint16_t>(bits));
}

template <Element element>
void multiply_warp(void* const (&payloads)[kLanes], unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const Multiply*>(payloads[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
      a[row][column] = widen(element, own.a[i] & 0xffffu);
      a[row][column + 1] = widen(element, own.a[i] >> 16);
      d[g + 8 * (i / 2)][2 * t + i % 2] = own.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = widen(element, own.b[i] & 0xffffu);
      b[2 * t + 8 * i + 1][g] = widen(element, own.b[i] >> 16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const Multiply*>(payloads[lane]);
    for (int i = 0; i < 4; ++i) own.d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

// A lane's row is read when the lane comes, not when the last one does: whoever wrote it has to have met this lane
// before. The instruction itself is no barrier for memory.
struct Load {
  uint32_t* r;
  uint16_t row[8];
};

uint32_t element(void* const (&payloads)[kLanes], int matrix, int row, int column) {
  return static_cast<const Load*>(payloads[8 * matrix + row])->row[column];
}

}  // namespace

void multiply(Element kind, float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  Multiply own{d, a, b};
  meet("mma_16x8x16", 0xffffffffu, site, &own,
       kind == Element::kBf16 ? multiply_warp<Element::kBf16> : multiply_warp<Element::kHalf>);
}

void load_matrices(uint32_t* r, const void* row, bool transposed, const Site& site) {
  check_shared("load_matrices", row, 16, 16);
  Load own{r, {}};
  std::memcpy(own.row, row, sizeof own.row);
  if (transposed) {
    meet("load_matrices_transposed", 0xffffffffu, site, &own, [](void* const(&payloads)[kLanes], unsigned) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int m = 0; m < 4; ++m) {
          static_cast<const Load*>(payloads[lane])->r[m] =
              element(payloads, m, 2 * t, g) | element(payloads, m, 2 * t + 1, g) << 16;
        }
      }
    });
  } else {
    meet("load_matrices", 0xffffffffu, site, &own, [](void* const(&payloads)[kLanes], unsigned) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int m = 0; m < 4; ++m) {
          static_cast<const Load*>(payloads[lane])->r[m] =
              element(payloads, m, g, 2 * t) | element(payloads, m, g, 2 * t + 1) << 16;
        }
      }
    });
  }
}

}  // namespace simt
