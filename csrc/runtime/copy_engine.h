// Moves KV blocks between device and host beside the iterations: two streams, one a direction, each a thread that makes
// its copies one after another, in the order they were handed in.
//
// A copy is under way from submit() until take() returns it, and its blocks are its own for that time. Whoever uses
// them afterwards sees what it wrote. One that fails is its direction's last.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <span>
#include <thread>
#include <unordered_set>
#include <vector>

#include "runtime/kv_pool.h"
#include "runtime/plan.h"

namespace fastserve {

// Blocks source … source + count - 1 go to destination … destination + count - 1.
struct BlockRun {
  int32_t source, destination, count;
};

// The fewest runs that move each row's source to its destination. Sources are distinct, as are destinations.
std::vector<BlockRun> coalesce(std::span<const CopyRow> rows);

class CopyEngine {
 public:
  // Each direction is slowed to `bandwidth` bytes a second; 0: as fast as memory is. Throws when the system refuses a
  // thread.
  CopyEngine(const KvPool& pool, int64_t bandwidth);
  // Drops the copies that are queued, and does not wait for the time a slowed one has left.
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // Throws where submit() would.
  void check(std::span<const CopyRow> rows);
  // Starts copies. Throws, and starts none, when one has the id or a block of another that is under way, is not of one
  // direction, has rows apart from each other, or a block outside its pool.
  void submit(std::span<const CopyRow> rows);
  // Takes the copies that have finished since the last call. To `wait` is to wait for one, unless none is under way.
  // Throws, each time, what one has failed with: what is in its blocks nobody knows.
  std::vector<FinishedCopy> take(bool wait);
  // Ends all waiting, for good.
  void stop();

 private:
  struct Copy {
    int32_t id;
    int32_t direction;
    std::vector<BlockRun> runs;
    double seconds;
  };
  struct Stream {
    std::deque<Copy> queue;
    std::condition_variable wake;
    std::thread thread;
  };
  struct Claims {
    std::unordered_set<int32_t> ids;
    std::unordered_set<int32_t> blocks[2];  // of each tier
  };

  std::vector<Copy> checked(std::span<const CopyRow> rows, Claims& claims) const;
  void work(Stream& stream);
  void move_blocks(const Copy& copy) const;
  void release(const Copy& copy);

  const KvPool& pool_;
  const int64_t bandwidth_;

  std::mutex mutex_;
  std::condition_variable finished_one_;
  Claims claims_;  // of the copies under way
  std::vector<Copy> finished_;
  std::exception_ptr failure_;
  bool stop_ = false;
  Stream streams_[2];  // by direction
};

}  // namespace fastserve
