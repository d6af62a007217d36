// Barriers in shared memory that count arrivals and bytes (PTX: mbarrier), and copies of tiles by a tensor map that
// complete on them (cp.async.bulk.tensor).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "machine/machine.h"
#include "machine/tensor_map.h"

namespace simt {

struct Thread;

struct SharedBarrier {
  int64_t expected, pending;  // arrivals of a phase, and those that are missing
  int64_t bytes = 0;          // that are expected and not there
  uint64_t phases = 0;        // that are complete
  const Thread* maker;
  bool published = false;  // whether copies and other blocks see that it was made
  std::vector<Thread*> waiting;
};

struct TileCopy {
  unsigned char* to;
  unsigned rank;
  TensorMap map;
  int column, row;
  uint64_t* barrier;
  const Launch* launch;
};

class Transfers {
 public:
  void clear();
  bool any() const { return !copies_.empty(); }
  void finish_one(uint64_t which);

  SharedBarrier& find(const char* operation, const uint64_t* barrier);
  void make(uint64_t* barrier, int arrivals);
  void publish();
  void check_phase(SharedBarrier& barrier);
  void begin(const TileCopy& copy);

 private:
  std::map<const uint64_t*, SharedBarrier> barriers_;
  std::vector<TileCopy> copies_;
};

// What the running thread does.
void init_barrier(uint64_t* barrier, int arrivals);
// fence.mbarrier_init: barriers that the thread has made may be used by copies and other blocks, after a barrier.
void publish_barriers();
void arrive_and_expect(uint64_t* barrier, int bytes);
// At the barrier in the same place of the shared memory of block `rank` of the cluster.
void arrive_at(uint64_t* barrier, unsigned rank);
void wait_barrier(uint64_t* barrier, int parity, const Site& site);
// The box at (column, row) to the same place in every block of the mask, and its bytes to the barrier there. It is
// poison from here on; the bytes arrive at any time, in any order. Outside the matrix there are zeros.
void copy_tile(void* to, const void* map, int column, int row, uint64_t* barrier, unsigned blocks);

// Addresses as instructions see them, in the window of the block's shared memory. Not aligned to more than 128 bytes.
uint32_t shared_address(const void* pointer);
constexpr uint32_t kSharedWindow = 1024 + 128;
// Where a byte of a swizzled layout really is (PTX, "Swizzling modes"): chunks of 16 bytes are permuted by the address
// bits above them. 128: bits 4-6 by 7-9; 64: bits 4-5 by 7-8; 32: bit 4 by 7.
uint32_t swizzled_address(uint32_t address, uint32_t swizzle_bytes);

}  // namespace simt
