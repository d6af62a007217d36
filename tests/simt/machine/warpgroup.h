// Products of a warpgroup, four warps, whose operands the matrix unit reads from shared memory by descriptors while the
// threads go on (PTX: wgmma.mma_async).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "machine/machine.h"
#include "machine/matrix.h"

namespace simt {

// One warp's quarter of a product that is under way: rows [16 w, 16 w + 16) of 64.
struct WarpProduct {
  Element element;
  int columns;
  uint64_t a, b;            // descriptors
  unsigned rank;            // whose shared memory
  int quarter;              // w
  float* sums[kLanes];      // every lane's columns / 2, poison until the product is waited for
  std::vector<float> held;  // [lane][columns / 2]: what it adds to
  bool follows;             // adds to what the one before it leaves
};

struct WarpProducts {
  std::vector<WarpProduct> open;                      // oldest first
  std::vector<size_t> groups;                         // sizes of those closed
  std::vector<std::pair<uint64_t, uint64_t>> issued;  // descriptors, which all warps of the group give alike
  // Sums as they were at the last fence, by lane.
  std::vector<std::pair<const float*, std::vector<float>>> fenced[kLanes];

  void clear();
  bool done() const { return open.empty(); }
};

// wgmma.fence: sums may be handed to a product from here on, if they stay as they are.
void fence_sums(const float* sums, int count, const Site& site);
// sums += A [64, 16] · Bᵀ [columns, 16]. Reads shared memory, by the descriptors, when the product is waited for.
void multiply_async(Element element, int columns, float* sums, uint64_t a, uint64_t b, const Site& site);
void commit_products(const Site& site);
void wait_products(int open, const Site& site);

}  // namespace simt
