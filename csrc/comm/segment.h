// Memory that processes of one host share, and by which they know of each other's end.
//
// It is a file without a name (memfd), so nothing is left in /dev/shm however its processes end, and /dev/shm's size is
// no limit. Ranks open it under /proc/<creator>/fd. Each holds a lock on the byte of its number, which the kernel
// releases when its process is gone, a zombie included. (A child forked without exec keeps its parent's lock alive.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastserve {

// A file descriptor with an owner.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int value() const { return value_; }

 private:
  const int value_;
};

// Zero-filled. Its creator keeps it until all ranks have opened it.
class SegmentFile {
 public:
  explicit SegmentFile(int64_t bytes);
  std::string path() const;

 private:
  Descriptor file_;
};

class Segment {
 public:
  // Throws when there is no such file of that size.
  Segment(const std::string& path, int64_t bytes);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* data() const { return data_; }
  // For as long as this object lives; throws when somebody holds it.
  void hold(int rank);
  bool held(int rank) const;  // by another than this

 private:
  Descriptor file_;
  const int64_t bytes_;
  std::byte* data_;
};

}  // namespace fastserve
