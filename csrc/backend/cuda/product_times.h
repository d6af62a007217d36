// How long each way to compute a product takes, for benchmarks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/cuda/cublaslt.h"
#include "backend/cuda/product_trial.h"
#include "backend/device_probe.h"

namespace fastserve::cuda {

class ProductTimes {
 public:
  // Of activations and weights of a 16-bit type, on the calling thread's device.
  explicit ProductTimes(DType dtype);

  // Waits until they are measured, with weights from the device's memory.
  ProductRates rates(int64_t m, int64_t n, int64_t k, bool wide, bool gated);
  std::string warpgroups() const;  // whether products by them are admitted, or why not

 private:
  // Operations a second of products of so many rows as `product` queues them; NaN if it does not.
  double rate(int64_t m, const Product& product) const;
  double library_rate(int64_t m) const;

  const DType dtype_;
  Stream stream_;
  Memory workspace_;
  std::unique_ptr<CublasLt> cublas_;          // what may stand in for ours, ...
  std::unique_ptr<CublasLtLibrary> library_;  // ... and all of it; null where it is not
  std::unique_ptr<ProductTrials> trials_;     // of the shape that was asked for last
  int64_t n_ = 0, k_padded_ = 0, most_rows_ = 0;
  bool wide_ = false;
};

}  // namespace fastserve::cuda
