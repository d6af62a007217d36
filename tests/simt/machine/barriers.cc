#include "machine/barriers.h"

#include <cstring>

#include "common/check.h"
#include "machine/block.h"

namespace simt {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;
constexpr uint64_t kMark = 0x5afeba55e5afeba5;

uint64_t mark(const uint64_t* barrier) { return kMark ^ reinterpret_cast<uintptr_t>(barrier); }

const TensorMap& checked_map(const void* map) {
  const auto& tensor = *static_cast<const TensorMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || tensor.magic != TensorMap::kMagic) {
    fault(join("copy_tile has no tensor map at ", map));
  }
  return tensor;
}

uint32_t box_bytes(const TensorMap& map) { return map.box_columns * map.box_rows * map.element_bytes; }

// The same place in another block's shared memory.
template <class T>
T* in_block(T* pointer, unsigned rank) {
  const auto offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(block().shared());
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(block().shared(rank)) + offset);
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block().shared()) + kSharedWindow;
}

uint32_t swizzled_address(uint32_t address, uint32_t swizzle_bytes) {
  const uint32_t chunks = swizzle_bytes / 16;  // 8, 4, 2 or 0
  return chunks == 0 ? address : address ^ ((address >> 7 & (chunks - 1)) << 4);
}

void Transfers::clear() {
  barriers_.clear();
  copies_.clear();
}

SharedBarrier& Transfers::find(const char* operation, const uint64_t* barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) fault(join(operation, ": there is no barrier yet"));
  if (*barrier != mark(barrier)) fault(join(operation, ": the barrier was overwritten"));
  return found->second;
}

void Transfers::make(uint64_t* barrier, int arrivals) {
  check_shared("init_barrier", barrier, sizeof *barrier, sizeof *barrier);
  if (arrivals < 1 || arrivals > kMostBytes) fault(join("init_barrier with ", arrivals, " arrivals"));
  *barrier = mark(barrier);
  barriers_[barrier] = {arrivals, arrivals, 0, 0, block().running(), false, {}};
}

void Transfers::publish() {
  for (auto& [place, barrier] : barriers_) barrier.published |= barrier.maker == block().running();
}

void Transfers::check_phase(SharedBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.pending = barrier.expected;
  for (Thread* thread : barrier.waiting) block().release(*thread);
  barrier.waiting.clear();
}

void Transfers::begin(const TileCopy& copy) {
  const uint32_t bytes = box_bytes(copy.map);
  for (const TileCopy& other : copies_) {
    const uint32_t others = box_bytes(other.map);
    if (copy.to < other.to + others && other.to < copy.to + bytes) fault("copy_tile to where another copy is going");
  }
  std::memset(copy.to, 0xff, bytes);
  copies_.push_back(copy);
}

void Transfers::finish_one(uint64_t which) {
  const size_t index = which % copies_.size();
  const TileCopy copy = copies_[index];
  copies_.erase(copies_.begin() + static_cast<ptrdiff_t>(index));
  const TensorMap& map = copy.map;
  const auto check = [&](bool holds, const char* what) {
    if (!holds) throw fastserve::Error(block().where() + ": copy_tile " + what);
  };
  check(block().lives(copy.rank), "into the shared memory of a block that has ended");
  const unsigned char* shared = block().shared(copy.rank);
  const auto window = static_cast<uint32_t>(copy.to - shared) + kSharedWindow;
  for (uint32_t row = 0; row < map.box_rows; ++row) {
    for (uint32_t column = 0; column < map.box_columns; ++column) {
      const int64_t x = int64_t{copy.column} + column, y = int64_t{copy.row} + row;
      const uint32_t at = window + (row * map.box_columns + column) * map.element_bytes;
      unsigned char* to = copy.to + (swizzled_address(at, map.swizzle_bytes) - window);
      const bool inside =
          x >= 0 && y >= 0 && x < static_cast<int64_t>(map.columns) && y < static_cast<int64_t>(map.rows);
      if (!inside) {
        std::memset(to, 0, map.element_bytes);
        continue;
      }
      const unsigned char* from =
          map.base + static_cast<uint64_t>(y) * map.pitch + static_cast<uint64_t>(x) * map.element_bytes;
      if (column == 0 || x == 0) {
        const auto is_device_memory = copy.launch->is_device_memory;
        check(is_device_memory == nullptr || is_device_memory(from, map.element_bytes), "of what is not the device's");
      }
      std::memcpy(to, from, map.element_bytes);
    }
  }
  const auto barrier = barriers_.find(copy.barrier);
  check(barrier != barriers_.end() && *copy.barrier == mark(copy.barrier), "to a barrier that is not there any more");
  barrier->second.bytes -= box_bytes(map);
  check(barrier->second.bytes >= -kMostBytes, "to a barrier that does not expect so many bytes");
  check_phase(barrier->second);
}

void init_barrier(uint64_t* barrier, int arrivals) { block().transfers().make(barrier, arrivals); }

void publish_barriers() { block().transfers().publish(); }

namespace {

void arrive(const char* operation, SharedBarrier& barrier) {
  if (barrier.pending == 0) fault(join(operation, ": more arrivals than the barrier expects"));
  --barrier.pending;
  block().transfers().check_phase(barrier);
}

}  // namespace

void arrive_and_expect(uint64_t* place, int bytes) {
  SharedBarrier& barrier = block().transfers().find("arrive_and_expect", place);
  barrier.bytes += bytes;
  if (bytes < 0 || barrier.bytes > kMostBytes) fault("arrive_and_expect: a barrier cannot expect so many bytes");
  arrive("arrive_and_expect", barrier);
}

void arrive_at(uint64_t* place, unsigned rank) {
  if (rank >= block().members()) fault(join("arrive_at block ", rank, " of a cluster of ", block().members()));
  if (!block().lives(rank)) fault(join("arrive_at block ", rank, ", which has ended"));
  SharedBarrier& barrier = block().transfers().find("arrive_at", in_block(place, rank));
  if (rank != cluster_rank() && !barrier.published) fault("arrive_at a barrier that was not published");
  arrive("arrive_at", barrier);
}

void wait_barrier(uint64_t* place, int parity, const Site& site) {
  if (parity != 0 && parity != 1) fault(join("wait_barrier for parity ", parity));
  SharedBarrier& barrier = block().transfers().find("wait_barrier", place);
  while (static_cast<int>(barrier.phases % 2) == parity) {
    barrier.waiting.push_back(block().running());
    block().wait_for_shared("wait_barrier", site);
  }
}

void copy_tile(void* to, const void* map, int column, int row, uint64_t* barrier, unsigned blocks) {
  const TensorMap& tensor = checked_map(map);
  check_shared("copy_tile", to, box_bytes(tensor), 128);
  if (blocks == 0 || blocks >> block().members() != 0) {
    fault(join("copy_tile to blocks ", blocks, " of a cluster of ", block().members()));
  }
  for (unsigned rank = 0; rank < block().members(); ++rank) {
    if ((blocks >> rank & 1u) == 0) continue;
    uint64_t* there = in_block(barrier, rank);
    if (!block().lives(rank)) fault(join("copy_tile to block ", rank, ", which has ended"));
    if (!block().transfers().find("copy_tile", there).published)
      fault("copy_tile with a barrier that was not published");
    block().transfers().begin(
        {static_cast<unsigned char*>(in_block(to, rank)), rank, tensor, column, row, there, &block().launch()});
  }
}

}  // namespace simt
