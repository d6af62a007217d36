// Whether another library's matrix product may stand in for ours: what is measured of it, and what follows from that.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda/kernels.h"
#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

// Row counts at which a candidate's results are compared with ours bit by bit, besides the most that there may be; of
// products that are added to what is there; and those at which it is timed.
constexpr std::array<int64_t, 10> kComparedRows = {1, 2, 8, 16, 17, 64, 100, 128, 512, 2048};
constexpr std::array<int64_t, 2> kAddedRows = {1, 100};
constexpr std::array<int64_t, 4> kTimedRows = {1, 32, 512, 2048};
using RowSeconds = std::array<double, kTimedRows.size()>;

struct ProductTrial {
  std::string name;
  bool runs;          // at every row count
  bool same_as_ours;  // every row, at every row count, has the bits of gemm()
  RowSeconds seconds;
};

// One way of computing products of a shape: queues the product; false if it cannot.
using Product = std::function<bool(const GemmCall&, cudaStream_t)>;
// Seconds that what `body` queues takes on the stream.
using DeviceClock = std::function<double(cudaStream_t, const std::function<void()>& body)>;
double time_on_device(cudaStream_t stream, const std::function<void()>& body);

// Random operands of one shape, on the device.
class ProductTrials {
 public:
  // The shape is that of 16-bit weights [n, k_padded], by which so many rows at most are multiplied; `workspace` is
  // that of gemm(). Products are timed by the clock, or only compared if there is none.
  ProductTrials(DType dtype, int64_t n, int64_t k_padded, bool wide, int64_t most_rows, void* workspace,
                cudaStream_t stream, DeviceClock clock = time_on_device);
  ~ProductTrials() { static_cast<void>(cudaStreamSynchronize(stream_)); }  // before its memory goes
  ProductTrials(const ProductTrials&) = delete;
  ProductTrials& operator=(const ProductTrials&) = delete;

  // Whether the product of so many rows, at most most_rows, runs and has gemm()'s bits; `onto`: added to numbers, where
  // outputs are wide.
  bool has_our_bits(int64_t rows, bool onto, const Product& product);
  // Of one product of so many rows, by the median of some runs, with weights that the device does not have in its
  // cache.
  double seconds(int64_t rows, const Product& product);
  ProductTrial measure(const std::string& name, const Product& product);
  const RowSeconds& ours() const { return ours_; }

 private:
  void add_to_numbers(const Product& us);
  GemmCall call(int64_t rows, const Memory& output) const;
  // Whether the product is there and is what ours is; `onto`: added to numbers.
  void compare(int64_t rows, bool onto, const Product& product, ProductTrial& trial);
  bool differs(const Memory& a, const Memory& b, int64_t rows);

  DType dtype_;
  int64_t n_, k_padded_;
  bool wide_;
  int64_t most_rows_;
  void* workspace_;
  cudaStream_t stream_;
  DeviceClock clock_;
  int64_t copies_ = 1, turn_ = 0;
  Memory input_, by_us_, output_, flag_;
  Memory numbers_, added_by_us_;  // where outputs are wide
  Memory weights_;                // copies_ of them
  RowSeconds ours_{};
};

struct ProductChoice {
  int trial;                          // or -1: none
  int64_t from_rows;                  // products of so many rows and more are the trial's, the others ours
  std::vector<std::string> verdicts;  // on every trial
};
// Of the trials whose bits are ours, so that no choice changes any, the one that is fastest for the most rows, if it is
// faster than ours there; it serves from the number of rows on where it is.
ProductChoice choose_product(std::span<const ProductTrial> trials, const RowSeconds& ours);

// ---- kernels (product_trial.cu)

// Sets *flag if any of the words differ.
void mark_differences(const uint32_t* a, const uint32_t* b, int64_t words, uint32_t* flag, cudaStream_t stream);

}  // namespace fastserve::cuda
