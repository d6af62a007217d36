// Which tokens jobs have seen, on the device, for penalties to look at: a table for each job of a batch. A job that is
// not in it may lose its table to another, and gets one again from what the host knows of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/cuda/transfers.h"

namespace fastserve::cuda {

// One job's tokens, and its table.
struct CountedJob {
  std::vector<int32_t> prompt, outputs;  // as far as they are known; the table is ahead of them
  uint32_t* table = nullptr;             // count_tokens(); null: none at the moment
  uint64_t batch = 0;                    // the latest that it was in
};

class CountTables {
 public:
  CountTables(int64_t vocab_size, cudaStream_t stream) : vocab_size_(vocab_size), stream_(stream) {}

  // Makes room for batches of so many jobs.
  void reserve(int64_t jobs);
  // The jobs of the next batch get tables that count what they have seen, in one upload for all that had none. They
  // stay where they are until they are dropped. What the jobs of an earlier batch were given is known by now if they
  // are in this one and not in the last.
  void bring(const std::vector<CountedJob*>& jobs);
  // The job is over, or its table not right any more.
  void drop(CountedJob& job);

 private:
  uint32_t* take(uint64_t batch);
  void allocate(int64_t tables);

  const int64_t vocab_size_;
  const cudaStream_t stream_;
  std::vector<Memory> memory_;
  int64_t tables_ = 0;               // in there
  std::vector<uint32_t*> free_;      // of them
  std::vector<CountedJob*> owners_;  // of the others
  uint64_t batches_ = 0;
  std::vector<int32_t> words_;  // to be uploaded
  Uploads uploads_;
};

}  // namespace fastserve::cuda
