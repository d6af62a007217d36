// The limits of a CUDA device, by plain copies and NVIDIA's own matrix product.
#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "backend/cuda/batch_clock.h"
#include "backend/cuda/cublaslt_library.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/product_times.h"
#include "backend/cuda/runtime_api.h"
#include "backend/device_probe.h"

namespace fastserve::cuda {

namespace {

// A sample is so many copies, or products, without a pause.
constexpr int kCopies = 8, kProducts = 10;
constexpr int64_t kMostPinned = int64_t{256} << 20;

template <class Body>
double seconds_of(Body&& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// What a product takes and makes. Of random numbers: on zeros devices are faster.
struct Operands {
  int64_t size;
  Memory input, weight, output;

  Operands(int64_t wanted, DType dtype)
      : size(round_up(wanted, kPad)),
        input(Place::kDevice, size * size * 2),
        weight(Place::kDevice, size * size * 2),
        output(Place::kDevice, size * size * 2) {
    constexpr int64_t kDrawn = int64_t{1} << 20;
    std::mt19937 generator(1);
    std::uniform_real_distribution<float> draw(-1, 1);
    std::vector<uint16_t> values(std::min(size * size, kDrawn));
    for (uint16_t& value : values) {
      const float drawn = draw(generator);
      value = dtype == DType::kFloat16 ? to_half(drawn).bits : to_bf16(drawn).bits;
    }
    for (Memory* matrix : {&input, &weight}) {
      for (int64_t first = 0; first < size * size; first += static_cast<int64_t>(values.size())) {
        const int64_t count = std::min(size * size - first, static_cast<int64_t>(values.size()));
        check(cudaMemcpy(matrix->as<uint16_t>() + first, values.data(), count * 2, cudaMemcpyHostToDevice));
      }
    }
    check(cudaStreamSynchronize(nullptr));  // for which our streams do not wait
  }
};

class CudaProbe final : public DeviceProbe {
 public:
  CudaProbe(DType dtype, int64_t bytes) : dtype_(dtype == DType::kFloat16 ? dtype : DType::kBFloat16), bytes_(bytes) {}

  double copy_rate() override {
    if (source_.bytes() == 0) {
      source_ = Memory(Place::kDevice, bytes_);
      target_ = Memory(Place::kDevice, bytes_);
    }
    const double seconds = seconds_of([&] {
      for (int i = 0; i < kCopies; ++i) {
        check(cudaMemcpyAsync(target_.as<void>(), source_.as<void>(), bytes_, cudaMemcpyDeviceToDevice, streams_[0]));
      }
      streams_[0].synchronize();
    });
    return 2.0 * kCopies * static_cast<double>(bytes_) / seconds;
  }

  double gemm_rate(int64_t size) override {
    if (operands_ == nullptr || operands_->size != round_up(size, kPad)) {
      open_library();
      operands_ = std::make_unique<Operands>(size, dtype_);
      if (cublas_ != nullptr) prepare(operands_->size);
      multiply();
      streams_[0].synchronize();
    }
    const double seconds = seconds_of([&] {
      for (int i = 0; i < kProducts; ++i) multiply();
      streams_[0].synchronize();
    });
    const auto edge = static_cast<double>(operands_->size);
    return 2.0 * kProducts * edge * edge * edge / seconds;
  }
  std::string gemm_library() override {
    open_library();
    return cublas_ != nullptr ? cublas_->name() : "FastServe's own";
  }

  ProductRates product_rates(int64_t m, int64_t n, int64_t k, bool wide, bool gated) override {
    return times().rates(m, n, k, wide, gated);
  }
  std::string warpgroups() override { return times().warpgroups(); }

  double transfer_rate(Transfer transfer) override {
    const int64_t bytes = std::min(bytes_, kMostPinned);
    for (Direction& direction : directions_) {
      if (direction.host.bytes() > 0) continue;
      direction.host = Memory(Place::kPinned, bytes);
      direction.device = Memory(Place::kDevice, bytes);
    }
    const double seconds = seconds_of([&] {
      for (int i = 0; i < kCopies; ++i) {
        if (transfer != Transfer::kToDevice) {
          check(cudaMemcpyAsync(directions_[0].host.as<void>(), directions_[0].device.as<void>(), bytes,
                                cudaMemcpyDeviceToHost, streams_[0]));
        }
        if (transfer != Transfer::kToHost) {
          check(cudaMemcpyAsync(directions_[1].device.as<void>(), directions_[1].host.as<void>(), bytes,
                                cudaMemcpyHostToDevice, streams_[1]));
        }
      }
      for (const Stream& stream : streams_) stream.synchronize();
    });
    return (transfer == Transfer::kBoth ? 2.0 : 1.0) * kCopies * static_cast<double>(bytes) / seconds;
  }

  void time_batches(int64_t most) override { BatchClock::instance().start(most); }
  std::vector<BatchSpan> take_times() override { return BatchClock::instance().take(); }

 private:
  struct Direction {
    Memory host, device;
  };

  ProductTimes& times() {
    if (times_ == nullptr) times_ = std::make_unique<ProductTimes>(dtype_);
    return *times_;
  }

  void open_library() {
    if (products_.bytes() > 0) return;
    products_ = Memory(Place::kDevice, kGemmWorkspace);
    cublas_ = CublasLtLibrary::open();
  }

  void prepare(int64_t size) {
    product_ = std::make_unique<CublasLtLibrary::Product>(*cublas_, dtype_, size, size, size, size, size, size, false);
    const auto proposed = cublas_->propose(*product_, 1, false);
    FS_CHECK(!proposed.empty(), "cuBLASLt has no product of two matrices [", size, ", ", size, "]");
    algorithm_ = proposed.front();
  }

  void multiply() {
    const Operands& all = *operands_;
    if (cublas_ != nullptr) {
      FS_CHECK(cublas_->multiply(algorithm_, *product_, all.weight.as<void>(), all.input.as<void>(),
                                 all.output.as<void>(), false, streams_[0]),
               "cuBLASLt does not do the product that it proposes");
      return;
    }
    gemm({.dtype = dtype_,
          .input = all.input.as<void>(),
          .ld_input = all.size,
          .weight = {format_of(dtype_), all.size, all.size, all.size, all.weight.as<void>(), nullptr},
          .bias = nullptr,
          .output = all.output.as<void>(),
          .ld_output = all.size,
          .m = all.size,
          .wide = false,
          .accumulate = false,
          .workspace = products_.as<void>()},
         streams_[0]);
  }

  const DType dtype_;
  const int64_t bytes_;
  std::unique_ptr<CublasLtLibrary> cublas_;  // null where there is none
  std::unique_ptr<CublasLtLibrary::Product> product_;
  CublasLtLibrary::Algorithm algorithm_{};  // the library's own choice, in whatever order it sums
  Stream streams_[2];
  Memory source_, target_;
  Memory products_;  // the workspace of ours
  std::unique_ptr<Operands> operands_;
  std::unique_ptr<ProductTimes> times_;
  Direction directions_[2];  // to the host, and back
};

}  // namespace

}  // namespace fastserve::cuda

extern "C" __attribute__((visibility("default"))) fastserve::DeviceProbe* fastserve_make_cuda_probe(
    fastserve::DType dtype, int64_t bytes, int device) {
  using namespace fastserve::cuda;
  check(cudaSetDevice(device));
  return new CudaProbe(dtype, bytes);
}
