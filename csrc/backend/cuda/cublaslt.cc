#include "backend/cuda/cublaslt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <tuple>
#include <utility>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/quantized_layout.h"

namespace fastserve::cuda {

namespace {

constexpr int kMostCandidates = 4;       // of each kind
constexpr int64_t kMostOutputs = 65536;  // more than that are logits, of which there are never many rows
constexpr size_t kSumsBytes = size_t{64} << 20;

bool is_debugged() {
  const char* set = std::getenv("FASTSERVE_DEBUG");
  return set != nullptr && *set != '\0' && std::string(set) != "0";
}

}  // namespace

std::string CublasShape::text() const {
  std::ostringstream line;
  line << "products of [m, " << key.k_padded << "] and [" << key.n << ", " << key.k_padded << "]"
       << (key.wide ? " in float32" : "") << ": ";
  if (choice.trial < 0) {
    line << "ours";
  } else {
    line << "cuBLASLt (" << trials[choice.trial].name << ") from " << std::max<int64_t>(choice.from_rows, 1)
         << " rows on";
  }
  const auto times = [&](const RowSeconds& seconds) {
    for (size_t i = 0; i < kTimedRows.size(); ++i) line << (i == 0 ? "" : ", ") << seconds[i] * 1e6;
  };
  line << "; microseconds at 1, 32, 512 and 2048 rows: ours ";
  times(ours);
  for (size_t i = 0; i < trials.size(); ++i) {
    line << "; " << trials[i].name << ' ';
    times(trials[i].seconds);
    line << " (" << choice.verdicts[i] << ')';
  }
  return line.str();
}

std::unique_ptr<CublasLt> CublasLt::open() {
  auto library = CublasLtLibrary::open();
  return library == nullptr ? nullptr : std::unique_ptr<CublasLt>(new CublasLt(std::move(library)));
}

CublasLt::CublasLt(std::unique_ptr<CublasLtLibrary> library)
    : library_(std::move(library)), sums_(Place::kDevice, kSumsBytes) {}

// Columns [first, first + columns) of all the products of the parts, added up in `output`.
bool CublasLt::add_parts(const CublasCandidate& candidate, const GemmCall& call, int64_t first, int64_t columns,
                         float* output, int64_t ld_output, cudaStream_t stream) const {
  const int64_t k = call.weight.k_padded / kGemmParts;
  const CublasLtLibrary::Product product(*library_, call.dtype, call.m, columns, k, call.weight.k_padded, call.ld_input,
                                         ld_output, true);
  const auto* weight = static_cast<const uint16_t*>(call.weight.data) + first * call.weight.k_padded;
  const auto* input = static_cast<const uint16_t*>(call.input);
  for (int part = 0; part < kGemmParts; ++part) {
    if (!library_->multiply(candidate.algorithm, product, weight + part * k, input + part * k, output, part > 0,
                            stream)) {
      return false;
    }
  }
  return true;
}

bool CublasLt::run(const CublasCandidate& candidate, const GemmCall& call, cudaStream_t stream) const {
  const int64_t n = call.weight.n, k = call.weight.k_padded;
  if (!candidate.by_parts) {
    const CublasLtLibrary::Product product(*library_, call.dtype, call.m, n, k, k, call.ld_input, call.ld_output,
                                           call.wide);
    return library_->multiply(candidate.algorithm, product, call.weight.data, call.input, call.output, call.accumulate,
                              stream);
  }
  if (call.wide && !call.accumulate && call.bias == nullptr) {
    return add_parts(candidate, call, 0, n, static_cast<float*>(call.output), call.ld_output, stream);
  }
  // As many columns at a time as there is room for.
  const int64_t room = static_cast<int64_t>(kSumsBytes / sizeof(float)) / call.m / kPad * kPad;
  if (room == 0) return false;
  for (int64_t first = 0; first < n; first += room) {
    const int64_t columns = std::min(room, n - first), ld = round_up(columns, kPad);
    if (!add_parts(candidate, call, first, columns, sums_.as<float>(), ld, stream)) {
      FS_CHECK(first == 0, "cuBLASLt multiplies ", call.m, " rows by ", room, " columns and not by ", columns);
      return false;
    }
    finish_product(call, sums_.as<float>(), ld, first, columns, stream);
  }
  return true;
}

CublasShape CublasLt::tried(const ProductKey& key, int64_t most_rows, void* workspace, cudaStream_t stream) const {
  const auto& [dtype, n, k_padded, wide, finished] = key;
  CublasShape shape{key, {}, {}, {}, {-1, 0, {}}};
  if (n > kMostOutputs) return shape;
  const int64_t most = kTimedRows.back(), ld_output = round_up(n, kPad);
  const auto propose = [&](bool by_parts) {
    const CublasLtLibrary::Product product(*library_, key.dtype, most, key.n,
                                           by_parts ? key.k_padded / kGemmParts : key.k_padded, key.k_padded,
                                           key.k_padded, ld_output, by_parts || key.wide);
    for (const auto& algorithm : library_->propose(product, kMostCandidates, true)) {
      shape.candidates.push_back({algorithm, by_parts});
    }
  };
  if (!finished) propose(false);
  if (k_padded % (kGemmParts * kSlab) == 0) propose(true);
  ProductTrials trials(dtype, n, k_padded, wide, most_rows, workspace, stream);
  for (const CublasCandidate& candidate : shape.candidates) {
    const std::string name = (candidate.by_parts ? "by parts" : "whole") + library_->name_of(candidate.algorithm);
    shape.trials.push_back(
        trials.measure(name, [&](const GemmCall& call, cudaStream_t queue) { return run(candidate, call, queue); }));
  }
  shape.ours = trials.ours();
  shape.choice = choose_product(shape.trials, shape.ours);
  if (is_debugged()) std::fprintf(stderr, "%s\n", shape.text().c_str());
  return shape;
}

const CublasShape* CublasLt::choose(const ProductKey& key, int64_t most_rows, void* workspace,
                                    cudaStream_t stream) const {
  static std::mutex mutex;
  static std::map<std::tuple<std::string, int, DType, int64_t, int64_t, bool, bool>, CublasShape> shapes;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::tuple place{library_->name(), device, key.dtype, key.n, key.k_padded, key.wide, key.finished};
  const std::lock_guard lock(mutex);
  auto found = shapes.find(place);
  if (found == shapes.end()) found = shapes.emplace(place, tried(key, most_rows, workspace, stream)).first;
  return found->second.choice.trial < 0 ? nullptr : &found->second;
}

bool CublasLt::gemm(const CublasShape& chosen, const GemmCall& call, cudaStream_t stream) const {
  if (call.m < std::max<int64_t>(chosen.choice.from_rows, 1)) return false;
  FS_CHECK(chosen.key.finished == (call.bias != nullptr || call.gated), "what was chosen is for other products");
  return run(chosen.candidates[chosen.choice.trial], call, stream);
}

}  // namespace fastserve::cuda
