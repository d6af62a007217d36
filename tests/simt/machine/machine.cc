#include "machine/machine.h"

#include <cstring>
#include <vector>

#include "machine/block.h"
#include "machine/faults.h"

namespace simt {

void run(const Launch& launch, const std::function<void()>& body, uint64_t seed) {
  Random random(seed);
  std::vector<uint3> order;
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; x += launch.cluster) order.push_back({x, y, z});
    }
  }
  random.shuffle(order);

  const CaughtSignals signals;
  Block& now = block();
  now.begin(launch, body, random.next());
  try {
    for (const uint3& index : order) now.run(index);
  } catch (...) {
    now.end();
    throw;
  }
  now.end();
}

void fault(const std::string& what) { block().fault(what); }

int lane() { return block().running()->lane; }

namespace {

void check_begun(const char* operation) {
  if (block().launch().early && !block().running()->begun) {
    fault(join(operation, " before wait_for_predecessor, in a kernel that begins early"));
  }
}

// Of what may come before the wait.
void check_next_let(const char* operation) {
  if (block().launch().early && !block().running()->next_let) {
    fault(join(operation, " before let_next_begin, in a kernel that begins early"));
  }
}

}  // namespace

void meet(const char* operation, unsigned mask, const Site& site, void* payload, Resolve resolve) {
  check_begun(operation);
  block().meet(operation, mask, site, payload, resolve);
}

bool block_barrier(const char* operation, const Site& site, bool predicate) {
  check_begun(operation);
  return block().barrier(operation, site, predicate);
}

void cluster_barrier(const Site& site) { block().cluster_barrier(site); }

void let_next_begin() { block().running()->next_let = true; }

void wait_for_predecessor() {
  check_next_let("wait_for_predecessor");
  block().running()->begun = true;
}

unsigned cluster_rank() { return block().running()->rank; }

unsigned char* shared_memory() {
  check_next_let("shared_memory");
  return block().shared();
}

namespace {

void check_alignment(const char* operation, const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fault(join(operation, " wants an address that is a multiple of ", alignment, ", got ", address));
  }
}

void check_in_shared(const char* operation, const void* address, size_t bytes, size_t alignment) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto begin = reinterpret_cast<uintptr_t>(block().shared());
  const size_t size = block().launch().shared_bytes;
  if (at < begin || at > begin + size || bytes > begin + size - at) {
    fault(join(operation, " is out of the block's ", size, " bytes of shared memory, at byte ",
               static_cast<ptrdiff_t>(at - begin)));
  }
  check_alignment(operation, address, alignment);
}

void check_in_global(const char* operation, const void* address, size_t bytes, size_t alignment) {
  const auto is_device_memory = block().launch().is_device_memory;
  if (is_device_memory != nullptr && !is_device_memory(address, bytes)) {
    fault(join(operation, " of ", bytes, " bytes at ", address, ", which are not the device's"));
  }
  check_alignment(operation, address, alignment);
}

void start_copy(const char* operation, void* to, const void* from, bool valid) {
  check_in_shared(operation, to, 16, 16);
  check_in_global(operation, from, valid ? 16 : 0, 16);
  std::memset(to, 0xff, 16);
  block().running()->copies.push_back({to, from, valid});
}

}  // namespace

void check_shared(const char* operation, const void* address, size_t bytes, size_t alignment) {
  check_begun(operation);
  check_in_shared(operation, address, bytes, alignment);
}

void check_global(const char* operation, const void* address, size_t bytes, size_t alignment) {
  check_begun(operation);
  check_in_global(operation, address, bytes, alignment);
}

void begin_copy(void* to, const void* from, bool valid) {
  check_begun("copy_async");
  start_copy("copy_async", to, from, valid);
}

void begin_constant_copy(void* to, const void* from) {
  check_next_let("copy_constant_async");
  start_copy("copy_constant_async", to, from, true);
}

void commit_copies() {
  Thread& thread = *block().running();
  size_t open = thread.copies.size();
  for (const size_t group : thread.copy_groups) open -= group;
  thread.copy_groups.push_back(open);
}

void wait_copies(int open) {
  Thread& thread = *block().running();
  size_t groups = 0, count = 0;
  while (thread.copy_groups.size() - groups > static_cast<size_t>(open)) count += thread.copy_groups[groups++];
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(count));
  thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + static_cast<ptrdiff_t>(groups));
}

}  // namespace simt
