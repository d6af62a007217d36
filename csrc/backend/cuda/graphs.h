// The operations of batches that were seen before, replayed in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

namespace fastserve::cuda {

class Graphs {
 public:
  // What tells batches apart whose operations differ: tokens, and positions that bound the grids.
  using Key = std::pair<int64_t, int64_t>;

  Graphs() = default;
  ~Graphs() { clear(); }
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;

  // Queues what `body` queues on the stream. The first time it is called as it is, so that what is allocated or loaded
  // on first use is there; the second time it is recorded; from then on replayed.
  void run(const Key& key, cudaStream_t stream, const std::function<void()>& body);
  // Addresses have changed.
  void clear();

 private:
  struct Graph {
    cudaGraphExec_t executable = nullptr;
    int64_t used = 0;
  };

  cudaGraphExec_t record(cudaStream_t stream, const std::function<void()>& body);
  void drop_oldest();

  std::map<Key, Graph> graphs_;
  int64_t runs_ = 0;
};

}  // namespace fastserve::cuda
