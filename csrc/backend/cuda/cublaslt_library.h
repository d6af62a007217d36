// NVIDIA's matrix products, from cuBLASLt where that is installed. It is looked for when it is asked for: nothing is
// linked with it, and its headers are not needed.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/runtime_api.h"
#include "common/dtype.h"

namespace fastserve::cuda {

// The part of the library's C interface that is used, as its documentation has it: the same in versions 12 and 13.
namespace cublaslt {

using Handle = void*;  // of the library, a description, a layout or a preference
using Status = int;
inline constexpr Status kSuccess = 0, kInvalidValue = 7, kNotSupported = 15;
inline constexpr int kCompute32F = 68, kTransposed = 1, kNoReduction = 0;
inline constexpr int kTransposeA = 3;                                          // of a description
inline constexpr int kMaxWorkspace = 1, kReductions = 3, kFirstAlignment = 5;  // of a preference; A, B, C and D follow
inline constexpr int kAlgorithmId = 0, kTileId = 1, kStagesId = 6;             // of an algorithm

struct Algorithm {
  uint64_t data[8];
};
struct Proposal {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

struct Functions {
  Status (*create)(Handle* library);
  Status (*destroy)(Handle library);
  size_t (*version)();
  Status (*make_description)(Handle* description, int compute, cudaDataType_t scale);
  Status (*drop_description)(Handle description);
  Status (*set_description)(Handle description, int attribute, const void* value, size_t bytes);
  Status (*make_layout)(Handle* layout, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*drop_layout)(Handle layout);
  Status (*make_preference)(Handle* preference);
  Status (*drop_preference)(Handle preference);
  Status (*set_preference)(Handle preference, int attribute, const void* value, size_t bytes);
  Status (*propose)(Handle library, Handle description, Handle a, Handle b, Handle c, Handle d, Handle preference,
                    int wanted, Proposal* found, int* count);
  Status (*look_at)(const Algorithm* algorithm, int attribute, void* value, size_t bytes, size_t* written);
  Status (*multiply)(Handle library, Handle description, const void* alpha, const void* a, Handle a_layout,
                     const void* b, Handle b_layout, const void* beta, const void* c, Handle c_layout, void* d,
                     Handle d_layout, const Algorithm* algorithm, void* workspace, size_t bytes, cudaStream_t stream);
};

}  // namespace cublaslt

class CublasLtLibrary {
 public:
  using Algorithm = cublaslt::Algorithm;

  // A kind of product: output[m, n] = input[m, k] · weight[n, k]ᵀ of row-major matrices, sums in float32.
  class Product {
   public:
    Product(const CublasLtLibrary& library, DType dtype, int64_t m, int64_t n, int64_t k, int64_t ld_weight,
            int64_t ld_input, int64_t ld_output, bool wide);
    ~Product() { drop(); }
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;

   private:
    friend class CublasLtLibrary;
    void drop();

    const cublaslt::Functions& functions_;
    cublaslt::Handle description_ = nullptr, weight_ = nullptr, input_ = nullptr, output_ = nullptr;
  };

  // Null where it is not to be used: what FASTSERVE_CUBLASLT names, or libcublasLt.so.13 or .12 of the system, the
  // toolkit or PyPI's wheel (nvidia-cublas, nvidia-cublas-cu12).
  static std::unique_ptr<CublasLtLibrary> open();
  ~CublasLtLibrary();
  CublasLtLibrary(const CublasLtLibrary&) = delete;
  CublasLtLibrary& operator=(const CublasLtLibrary&) = delete;

  std::string name() const;  // with its version
  std::string name_of(const Algorithm& algorithm) const;

  // Algorithms for such products with matrices that are 128-byte aligned, by the library's own guess the best ones
  // first, `most` of them or fewer. `in_order`: none that adds up parts of a sum which it has split.
  std::vector<Algorithm> propose(const Product& product, int most, bool in_order) const;
  // Queues one: output = product, or += `onto`. False where the algorithm is not made for such products. Allocates
  // nothing on the device. One at a time: they share a workspace.
  bool multiply(const Algorithm& algorithm, const Product& product, const void* weight, const void* input, void* output,
                bool onto, cudaStream_t stream) const;

 private:
  CublasLtLibrary(const cublaslt::Functions& functions, cublaslt::Handle handle);

  const cublaslt::Functions functions_;
  const cublaslt::Handle handle_;
  const Memory workspace_;
};

}  // namespace fastserve::cuda
