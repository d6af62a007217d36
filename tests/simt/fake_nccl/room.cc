#include "fake_nccl/room.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "common/check.h"

namespace fake_nccl {

Room::Room(std::string name, int size) : name_(std::move(name)), size_(size) {
  const int file = shm_open(name_.c_str(), O_CREAT | O_RDWR, 0600);
  FS_CHECK(file >= 0 && ftruncate(file, sizeof(Shared)) == 0, "no shared memory for NCCL's stand-in");
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  close(file);
  FS_CHECK(memory != MAP_FAILED, "no room for NCCL's stand-in");
  shared_ = static_cast<Shared*>(memory);
  if (shared_->joined.fetch_add(1) + 1 == size_) shm_unlink(name_.c_str());
}

Room::~Room() {
  if (!complete()) shm_unlink(name_.c_str());
  munmap(shared_, sizeof(Shared));
}

}  // namespace fake_nccl
