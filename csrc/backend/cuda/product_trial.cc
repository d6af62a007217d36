#include "backend/cuda/product_trial.h"

#include <algorithm>
#include <random>

namespace fastserve::cuda {

namespace {

constexpr int kTimedRuns = 5;
// Weights of a model come from the device's memory, since all the others go through its cache before their turn comes
// again. So trials multiply by copies in turn, which come to so many times that cache. Of few rows, where that is most
// of a product's time, a run is so many products without a pause, as in an iteration.
constexpr int64_t kCachesOfWeights = 4;
constexpr int64_t kFewRows = 32;
constexpr int kProductsOfFewRows = 8;
constexpr double kAsFast = 1.05;  // of our time, where ours would also do

// Numbers near 1 or -1 of random bits, as wide as the type: sums of them round at every step.
Memory random_elements(DType dtype, int64_t count, uint32_t seed) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> piece(std::min(count, kPiece));
  for (uint16_t& bits : piece) {
    const float x = normal(generator);
    bits = dtype == DType::kBFloat16 ? to_bf16(x).bits : to_half(x).bits;
  }
  Memory memory(Place::kDevice, count * 2);
  for (int64_t first = 0; first < count; first += kPiece) {
    check(cudaMemcpy(memory.as<uint16_t>() + first, piece.data(), std::min(kPiece, count - first) * 2,
                     cudaMemcpyHostToDevice));
  }
  check(cudaStreamSynchronize(nullptr));  // which the call's own stream would not wait for
  return memory;
}

int64_t cache_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
}

class Timestamp {
 public:
  Timestamp() { check(cudaEventCreate(&event_)); }
  ~Timestamp() { static_cast<void>(cudaEventDestroy(event_)); }
  Timestamp(const Timestamp&) = delete;
  Timestamp& operator=(const Timestamp&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

double time_on_device(cudaStream_t stream, const std::function<void()>& body) {
  const Timestamp begin, end;
  check(cudaEventRecord(begin, stream));
  body();
  check(cudaEventRecord(end, stream));
  check(cudaEventSynchronize(end));
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  return milliseconds * 1e-3;
}

ProductTrials::ProductTrials(DType dtype, int64_t n, int64_t k_padded, bool wide, void* workspace, cudaStream_t stream,
                             DeviceClock clock)
    : dtype_(dtype),
      n_(n),
      k_padded_(k_padded),
      wide_(wide),
      workspace_(workspace),
      stream_(stream),
      clock_(std::move(clock)) {
  const int64_t most = kTimedRows.back(), output_bytes = most * round_up(n, kPad) * (wide ? 4 : 2);
  input_ = random_elements(dtype, most * k_padded, 1);
  const Memory weight = random_elements(dtype, n * k_padded, 2);
  copies_ = std::max<int64_t>(1, ceil_div(kCachesOfWeights * cache_bytes(), static_cast<int64_t>(weight.bytes())));
  weights_ = Memory(Place::kDevice, copies_ * weight.bytes());
  for (int64_t i = 0; i < copies_; ++i) {
    check(cudaMemcpyAsync(weights_.as<std::byte>() + i * weight.bytes(), weight.as<void>(), weight.bytes(),
                          cudaMemcpyDeviceToDevice, stream_));
  }
  check(cudaStreamSynchronize(stream_));
  for (Memory* output : {&by_us_, &most_, &output_}) *output = Memory(Place::kDevice, output_bytes);
  flag_ = Memory(Place::kDevice, sizeof(uint32_t));
  const Product us = [](const GemmCall& product, cudaStream_t queue) {
    cuda::gemm(product, queue);
    return true;
  };
  us(call(most, by_us_), stream_);
  for (size_t i = 0; i < kTimedRows.size(); ++i) ours_[i] = seconds(kTimedRows[i], us);
}

GemmCall ProductTrials::call(int64_t rows, const Memory& output) const {
  return {.dtype = dtype_,
          .input = input_.as<void>(),
          .ld_input = k_padded_,
          .weight = {format_of(dtype_), n_, k_padded_, k_padded_, weights_.as<void>(), nullptr},
          .bias = nullptr,
          .output = output.as<void>(),
          .ld_output = round_up(n_, kPad),
          .m = rows,
          .wide = wide_,
          .accumulate = false,
          .workspace = workspace_};
}

bool ProductTrials::differs(const Memory& a, const Memory& b, int64_t rows) {
  const int64_t words = rows * round_up(n_, kPad) / (wide_ ? 1 : 2);
  check(cudaMemsetAsync(flag_.as<void>(), 0, sizeof(uint32_t), stream_));
  mark_differences(a.as<uint32_t>(), b.as<uint32_t>(), words, flag_.as<uint32_t>(), stream_);
  uint32_t flag = 0;
  check(cudaStreamSynchronize(stream_));
  check(cudaMemcpy(&flag, flag_.as<void>(), sizeof flag, cudaMemcpyDeviceToHost));
  return flag != 0;
}

double ProductTrials::seconds(int64_t rows, const Product& product) {
  GemmCall timed = call(rows, output_);
  product(timed, stream_);  // what happens once is not timed
  const int products = rows <= kFewRows ? kProductsOfFewRows : 1;
  const auto body = [&] {
    for (int i = 0; i < products; ++i) {
      turn_ = (turn_ + 1) % copies_;
      timed.weight.data = weights_.as<uint16_t>() + turn_ * n_ * k_padded_;
      product(timed, stream_);
    }
  };
  std::array<double, kTimedRuns> runs;
  for (double& run : runs) run = clock_(stream_, body) / products;
  std::sort(runs.begin(), runs.end());
  return runs[kTimedRuns / 2];
}

ProductTrial ProductTrials::measure(const std::string& name, const Product& product) {
  ProductTrial trial{name, true, true, true, {}};
  const int64_t most = kTimedRows.back();
  trial.runs = product(call(most, most_), stream_);
  if (!trial.runs) return trial;
  trial.same_as_ours = !differs(most_, by_us_, most);
  for (const int64_t rows : kComparedRows) {
    check(cudaMemsetAsync(output_.as<void>(), 0, output_.bytes(), stream_));
    trial.runs = product(call(rows, output_), stream_);
    if (!trial.runs) return trial;
    if (differs(output_, most_, rows)) {
      trial.same_across_rows = trial.same_as_ours = false;
      return trial;
    }
  }
  for (size_t i = 0; i < kTimedRows.size(); ++i) trial.seconds[i] = seconds(kTimedRows[i], product);
  return trial;
}

ProductChoice choose_product(std::span<const ProductTrial> trials, const RowSeconds& ours) {
  ProductChoice choice{-1, 0, {}};
  for (size_t i = 0; i < trials.size(); ++i) {
    const ProductTrial& trial = trials[i];
    const auto reject = [&](const char* why) { choice.verdicts.emplace_back(why); };
    if (!trial.runs) {
      reject("cannot do every number of rows");
      continue;
    }
    if (!trial.same_across_rows) {
      reject("a row's bits depend on the number of rows");
      continue;
    }
    if (trial.seconds.back() >= ours.back()) {
      reject("not faster for many rows");
      continue;
    }
    int64_t from = 0;
    if (trial.same_as_ours) {
      size_t first = kTimedRows.size() - 1;
      while (first > 0 && trial.seconds[first - 1] < ours[first - 1]) --first;
      from = first == 0 ? 0 : kTimedRows[first];
    } else if (trial.seconds[0] > kAsFast * ours[0] || trial.seconds[1] > kAsFast * ours[1]) {
      reject("slower for few rows, and not the same bits as ours");
      continue;
    }
    choice.verdicts.emplace_back("may be taken");
    if (choice.trial < 0 || trial.seconds.back() < trials[choice.trial].seconds.back()) {
      choice.trial = static_cast<int>(i);
      choice.from_rows = from;
    }
  }
  if (choice.trial >= 0) choice.verdicts[choice.trial] = "taken";
  return choice;
}

}  // namespace fastserve::cuda
