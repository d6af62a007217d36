// What MPI libraries keep in /dev/shm for the ranks of one host: files with names, which stay there for good when a
// rank does not end in order, and by which MPI_Init dies where there is no room for them.
#pragma once

namespace fastserve {

// Takes the names off those that this process has mapped. Ranks that have them mapped, too, go on sharing them; their
// memory is free when the last of these ends, in whatever way.
void unlink_mpi_memory();

// While it lives, a thread that finds no room for what it writes to shared memory (SIGBUS) stands still, and a byte is
// written to `alarm`: whoever reads it says why, and ends the process. With a negative `alarm` nothing is different.
class RoomWatch {
 public:
  explicit RoomWatch(int alarm);
  ~RoomWatch();
  RoomWatch(const RoomWatch&) = delete;
  RoomWatch& operator=(const RoomWatch&) = delete;

 private:
  const bool watches_;
};

}  // namespace fastserve
