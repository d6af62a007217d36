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

ProductTrials::ProductTrials(DType dtype, int64_t n, int64_t k_padded, bool wide, int64_t most_rows, void* workspace,
                             cudaStream_t stream, DeviceClock clock)
    : dtype_(dtype),
      n_(n),
      k_padded_(k_padded),
      wide_(wide),
      most_rows_(clock == nullptr ? most_rows : std::max(most_rows, kTimedRows.back())),
      workspace_(workspace),
      stream_(stream),
      clock_(std::move(clock)) {
  const int64_t output_bytes = most_rows_ * round_up(n, kPad) * (wide ? 4 : 2);
  input_ = random_elements(dtype, most_rows_ * k_padded, 1);
  const Memory weight = random_elements(dtype, n * k_padded, 2);
  if (clock_ != nullptr) {
    copies_ = std::max<int64_t>(1, ceil_div(kCachesOfWeights * cache_bytes(), static_cast<int64_t>(weight.bytes())));
  }
  weights_ = Memory(Place::kDevice, copies_ * weight.bytes());
  for (int64_t i = 0; i < copies_; ++i) {
    check(cudaMemcpyAsync(weights_.as<std::byte>() + i * weight.bytes(), weight.as<void>(), weight.bytes(),
                          cudaMemcpyDeviceToDevice, stream_));
  }
  check(cudaStreamSynchronize(stream_));
  for (Memory* output : {&by_us_, &output_}) *output = Memory(Place::kDevice, output_bytes);
  flag_ = Memory(Place::kDevice, sizeof(uint32_t));
  const Product us = [](const GemmCall& product, cudaStream_t queue) {
    cuda::gemm(product, queue);
    return true;
  };
  us(call(most_rows_, by_us_), stream_);
  if (wide) add_to_numbers(us);
  for (size_t i = 0; clock_ != nullptr && i < kTimedRows.size(); ++i) ours_[i] = seconds(kTimedRows[i], us);
}

// The numbers are the products themselves, in other rows.
void ProductTrials::add_to_numbers(const Product& us) {
  for (Memory* output : {&numbers_, &added_by_us_}) *output = Memory(Place::kDevice, by_us_.bytes());
  const size_t row = round_up(n_, kPad) * sizeof(float), rest = by_us_.bytes() - row;
  const auto copy = [&](const Memory& to, size_t at, const Memory& from, size_t first, size_t bytes) {
    check(cudaMemcpyAsync(to.as<std::byte>() + at, from.as<std::byte>() + first, bytes, cudaMemcpyDeviceToDevice,
                          stream_));
  };
  copy(numbers_, 0, by_us_, row, rest);
  copy(numbers_, rest, by_us_, 0, row);
  copy(added_by_us_, 0, numbers_, 0, numbers_.bytes());
  GemmCall added = call(most_rows_, added_by_us_);
  added.accumulate = true;
  us(added, stream_);
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

void ProductTrials::compare(int64_t rows, bool onto, const Product& product, ProductTrial& trial) {
  if (onto) {
    check(cudaMemcpyAsync(output_.as<void>(), numbers_.as<void>(), output_.bytes(), cudaMemcpyDeviceToDevice, stream_));
  } else {
    check(cudaMemsetAsync(output_.as<void>(), 0, output_.bytes(), stream_));
  }
  GemmCall compared = call(rows, output_);
  compared.accumulate = onto;
  trial.runs = trial.runs && product(compared, stream_);
  trial.same_as_ours = trial.runs && trial.same_as_ours && !differs(output_, onto ? added_by_us_ : by_us_, rows);
}

bool ProductTrials::has_our_bits(int64_t rows, bool onto, const Product& product) {
  ProductTrial trial{"", true, true, {}};
  compare(rows, onto, product, trial);
  return trial.same_as_ours;
}

ProductTrial ProductTrials::measure(const std::string& name, const Product& product) {
  ProductTrial trial{name, true, true, {}};
  for (const int64_t rows : kComparedRows) compare(rows, false, product, trial);
  compare(most_rows_, false, product, trial);
  if (wide_) {
    for (const int64_t rows : kAddedRows) compare(rows, true, product, trial);
    compare(most_rows_, true, product, trial);
  }
  if (!trial.same_as_ours) return trial;
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
    if (!trial.same_as_ours) {
      reject("its bits are not ours");
      continue;
    }
    if (trial.seconds.back() >= ours.back()) {
      reject("not faster for many rows");
      continue;
    }
    size_t first = kTimedRows.size() - 1;
    while (first > 0 && trial.seconds[first - 1] < ours[first - 1]) --first;
    choice.verdicts.emplace_back("may be taken");
    if (choice.trial < 0 || trial.seconds.back() < trials[choice.trial].seconds.back()) {
      choice.trial = static_cast<int>(i);
      choice.from_rows = first == 0 ? 0 : kTimedRows[first];
    }
  }
  if (choice.trial >= 0) choice.verdicts[choice.trial] = "taken";
  return choice;
}

}  // namespace fastserve::cuda
