#include "backend/cuda/product_times.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/warpgroup_trial.h"

namespace fastserve::cuda {

namespace {
constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
}

ProductTimes::ProductTimes(DType dtype)
    : dtype_(dtype),
      workspace_(Place::kDevice, kGemmWorkspace),
      cublas_(CublasLt::open()),
      library_(CublasLtLibrary::open()) {}

std::string ProductTimes::warpgroups() const { return try_warpgroups(dtype_, workspace_.as<void>(), stream_).verdict; }

double ProductTimes::rate(int64_t m, const Product& product) const {
  bool done = true;
  const double seconds = trials_->seconds(m, [&](const GemmCall& call, cudaStream_t stream) {
    done = done && product(call, stream);
    return done;
  });
  const double operations = 2.0 * static_cast<double>(m) * static_cast<double>(n_) * static_cast<double>(k_padded_);
  return done ? operations / seconds : kUnknown;
}

double ProductTimes::library_rate(int64_t m) const {
  if (library_ == nullptr) return kUnknown;
  const CublasLtLibrary::Product shape(*library_, dtype_, m, n_, k_padded_, k_padded_, k_padded_, round_up(n_, kPad),
                                       wide_);
  const auto proposed = library_->propose(shape, 1, false);
  if (proposed.empty()) return kUnknown;
  return rate(m, [&](const GemmCall& call, cudaStream_t stream) {
    return library_->multiply(proposed.front(), shape, call.weight.data, call.input, call.output, false, stream);
  });
}

ProductRates ProductTimes::rates(int64_t m, int64_t n, int64_t k, bool wide, bool gated) {
  const int64_t k_padded = round_up(k, kPad);
  const bool admitted = try_warpgroups(dtype_, workspace_.as<void>(), stream_).admitted;
  if (trials_ == nullptr || n != n_ || k_padded != k_padded_ || wide != wide_ || m > most_rows_) {
    n_ = n;
    k_padded_ = k_padded;
    wide_ = wide;
    most_rows_ = std::max(m, most_rows_);
    trials_.reset();  // first, or both would have to fit
    trials_ = std::make_unique<ProductTrials>(dtype_, n, k_padded, wide, most_rows_, workspace_.as<void>(), stream_);
  }
  const auto by = [&](GemmKernel kernel) {
    return rate(m, [kernel](const GemmCall& call, cudaStream_t stream) {
      gemm_with(kernel, call, stream);
      return true;
    });
  };
  const GemmCall call{.dtype = dtype_,
                      .input = nullptr,
                      .ld_input = k_padded,
                      .weight = {format_of(dtype_), n, k, k_padded, nullptr, nullptr},
                      .bias = nullptr,
                      .output = nullptr,
                      .ld_output = round_up(n, kPad),
                      .m = m,
                      .wide = wide,
                      .accumulate = false,
                      .workspace = workspace_.as<void>()};
  ProductRates rates{by(gemm_kernel(call, false)), kUnknown, library_rate(m), ""};
  for (const GemmKernel kernel : {GemmKernel::kWarpgroup128, GemmKernel::kWarpgroup192}) {
    if (admitted) rates.warpgroups = std::fmax(rates.warpgroups, by(kernel));
  }
  const CublasShape* theirs = cublas_ == nullptr ? nullptr
                                                 : cublas_->choose({dtype_, n, k_padded, wide, gated}, most_rows_,
                                                                   workspace_.as<void>(), stream_);
  const bool is_theirs = theirs != nullptr && m >= std::max<int64_t>(theirs->choice.from_rows, 1);
  rates.taken = is_theirs ? "cuBLASLt" : geometry(gemm_kernel(call, admitted)).name;
  return rates;
}

}  // namespace fastserve::cuda
