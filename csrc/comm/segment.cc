#include "comm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "common/check.h"

namespace fastserve {

namespace {

struct flock byte_lock(int rank) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

}  // namespace

Descriptor::~Descriptor() {
  if (value_ >= 0) close(value_);
}

SegmentFile::SegmentFile(int64_t bytes) : file_(memfd_create("fastserve", MFD_CLOEXEC)) {
  FS_CHECK(file_.value() >= 0 && ftruncate(file_.value(), bytes) == 0, "cannot make shared memory of ", bytes,
           " bytes: ", std::strerror(errno));
}

std::string SegmentFile::path() const {
  return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(file_.value());
}

Segment::Segment(const std::string& path, int64_t bytes)
    : file_(open(path.c_str(), O_RDWR | O_CLOEXEC)), bytes_(bytes) {
  FS_CHECK(file_.value() >= 0, "cannot open shared memory ", path, ": ", std::strerror(errno));
  struct stat status = {};
  FS_CHECK(fstat(file_.value(), &status) == 0 && S_ISREG(status.st_mode) && status.st_size == bytes, "shared memory ",
           path, " has ", status.st_size, " bytes, not ", bytes, ": made for other ranks or by another version");
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_.value(), 0);
  FS_CHECK(data != MAP_FAILED, "cannot map ", bytes, " bytes of shared memory: ", std::strerror(errno));
  data_ = static_cast<std::byte*>(data);
}

Segment::~Segment() { munmap(data_, bytes_); }

void Segment::hold(int rank) {
  struct flock lock = byte_lock(rank);
  FS_CHECK(fcntl(file_.value(), F_OFD_SETLK, &lock) == 0, "rank ", rank, " of this shared memory is taken");
}

bool Segment::held(int rank) const {
  struct flock lock = byte_lock(rank);
  return fcntl(file_.value(), F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace fastserve
