// Batches as kernels see them: put together on the host, uploaded in one copy.
#pragma once

#include <vector>

#include "backend/cuda/kernels.h"
#include "backend/cuda/transfers.h"

namespace fastserve::cuda {

// Batches of one token a row are filled up to one of few sizes, so that few graphs do for all of them.
int64_t filled_up_rows(int64_t rows);

class BatchUploader {
 public:
  explicit BatchUploader(int64_t block_size) : block_size_(block_size) {}

  int64_t block_size() const { return block_size_; }

  // Makes room for batches of so many rows with contexts of up to so many positions, and of as many tokens as the last
  // one had.
  void reserve(int64_t rows, int64_t positions, cudaStream_t stream);
  // Queues the upload on the stream. The result holds until the next one, whose upload waits for what is queued before
  // it. A batch that can be replayed has one token a row and wants all of their logits; it is filled up, and its
  // max_context rounded up, so that batches whose counts are equal lie at equal addresses.
  DeviceBatch upload(const Batch& batch, cudaStream_t stream);
  bool replayable() const { return replayable_; }
  // Whether addresses of earlier batches no longer hold, since the last time it was asked.
  bool moved() { return uploads_.moved(); }

 private:
  DeviceBatch lay_out(int64_t tokens, const Batch& batch, cudaStream_t stream);

  const int64_t block_size_;
  std::vector<int32_t> words_;  // the batch, as it is uploaded
  Uploads uploads_;
  bool replayable_ = false;
};

}  // namespace fastserve::cuda
