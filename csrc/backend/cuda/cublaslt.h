// cuBLASLt's products in the place of ours, for shapes where that is faster and the bits are ours (DESIGN §3): which is
// faster is chance where it is close, and must not show.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/cublaslt_library.h"
#include "backend/cuda/product_trial.h"

namespace fastserve::cuda {

// An algorithm for products of a shape. `by_parts`: it is called for each of kGemmParts parts of the inputs, whose sums
// it adds in ascending order, as gemm() does; such a one may have gemm()'s very bits.
struct CublasCandidate {
  CublasLtLibrary::Algorithm algorithm;
  bool by_parts;
};

// Products with weights [n, k_padded] of a 16-bit type. `finished`: by a kernel of ours, which adds a bias, or has gate
// and up meet. That takes an algorithm by parts.
struct ProductKey {
  DType dtype;
  int64_t n, k_padded;
  bool wide, finished;
};

// What was tried for such products, and what came of it.
struct CublasShape {
  ProductKey key;
  std::vector<CublasCandidate> candidates;
  std::vector<ProductTrial> trials;  // of each
  RowSeconds ours;
  ProductChoice choice;

  // One line for a log.
  std::string text() const;
};

class CublasLt {
 public:
  // Null where the library is not to be used.
  static std::unique_ptr<CublasLt> open();

  // Tries the algorithms that cuBLASLt proposes for such products of up to so many rows on random operands, and pins
  // one or none: null then, and all products are ours. To be called before products of that shape are queued; waits for
  // the stream. `workspace` is that of gemm(). Once for each shape and device in a process: later calls return the
  // first one's choice, which stays where it is.
  const CublasShape* choose(const ProductKey& key, int64_t most_rows, void* workspace, cudaStream_t stream) const;

  // Queues the product if it is one of those that the choice is for and the algorithm is made for so many rows; else
  // false, and the caller queues gemm().
  // Allocates nothing on the device, so that it may be captured in a graph.
  bool gemm(const CublasShape& chosen, const GemmCall& call, cudaStream_t stream) const;

 private:
  explicit CublasLt(std::unique_ptr<CublasLtLibrary> library);

  CublasShape tried(const ProductKey& key, int64_t most_rows, void* workspace, cudaStream_t stream) const;
  bool run(const CublasCandidate& candidate, const GemmCall& call, cudaStream_t stream) const;
  bool add_parts(const CublasCandidate& candidate, const GemmCall& call, int64_t first, int64_t columns, float* output,
                 int64_t ld_output, cudaStream_t stream) const;

  const std::unique_ptr<CublasLtLibrary> library_;
  const Memory sums_;
};

}  // namespace fastserve::cuda
