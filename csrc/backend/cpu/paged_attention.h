// Attention over the paged KV pool: stores K and V, cuts the work and shares it out.
#pragma once

#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/kv_layout.h"
#include "common/buffer.h"
#include "common/thread_pool.h"

namespace fastserve::cpu {

class PagedAttention {
 public:
  PagedAttention(const KernelTable& kernels, ThreadPool& threads) : kernels_(kernels), threads_(threads) {}

  void set_pool(const KvLayout& layout, void* base) {
    kv_ = layout;
    base_ = static_cast<char*>(base);
  }
  const KvLayout& layout() const { return kv_; }

  // Writes K and V of the row's i-th token.
  void store(const RopeAndStoreArgs& args, const Row& row, int64_t i) const;
  void run(const AttentionArgs& args, std::span<const Row> rows);

 private:
  // Some queries of one row at one KV head.
  struct Tile {
    const Row* row;
    int64_t kv_head;
    int64_t first_head, heads;  // query heads
    int64_t first, queries;
    int64_t segments;  // it is cut into, or 0: it is not cut
    int64_t partial;   // where their results lie
  };
  struct Task {
    int64_t tile, segment;
  };

  int64_t cut(const AttentionArgs& args, std::span<const Row> rows);
  void attend(const AttentionArgs& args, const Task& task, int thread);
  int64_t head_offset(int64_t layer, int64_t kv_head) const {
    return layer * kv_.layer_elements() + kv_head * kv_.head_elements();
  }

  const KernelTable& kernels_;
  ThreadPool& threads_;
  KvLayout kv_{};
  char* base_ = nullptr;
  // Kept from call to call, so that only the largest one so far allocates.
  std::vector<Tile> tiles_;
  std::vector<Task> tasks_;
  std::vector<int32_t> open_;  // segments of a tile that are not done
  Buffer partials_;
  Buffer scratch_;
  int64_t scratch_floats_ = 0;  // of one thread
};

}  // namespace fastserve::cpu
