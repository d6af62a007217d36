// cuBLASLt's products in the place of ours, for shapes where that is faster and a row's bits stay the same whatever the
// number of rows (DESIGN §3). Without cuBLASLt (no_cublaslt.cc) all products are ours.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/product_trial.h"

namespace fastserve::cuda {

// What was tried for one shape, and what came of it.
struct CublasReport {
  DType dtype;
  int64_t n, k_padded;
  bool wide;
  std::vector<ProductTrial> trials;
  RowSeconds ours;
  ProductChoice choice;

  // One line for a log.
  std::string text() const;
};

class CublasLt {
 public:
  CublasLt();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  static bool available();

  // Tries the algorithms that cuBLASLt proposes for products with 16-bit weights [n, k_padded] on random operands, and
  // pins one or none. To be called before products of that shape are queued; waits for the stream. `workspace` is that
  // of gemm(). Once for each shape: later calls return the first one's report.
  const CublasReport& tune(DType dtype, int64_t n, int64_t k_padded, bool wide, void* workspace, cudaStream_t stream);

  // Queues the product if cuBLASLt has it; else false, and the caller queues gemm(). Allocates nothing, so that it may
  // be captured in a graph.
  bool gemm(const GemmCall& call, cudaStream_t stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fastserve::cuda
