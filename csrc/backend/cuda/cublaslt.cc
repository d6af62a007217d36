#include "backend/cuda/cublaslt.h"

#include <cublasLt.h>

#include <algorithm>
#include <map>
#include <sstream>
#include <tuple>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/quantized_layout.h"
#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

namespace {

constexpr int kMostCandidates = 4;       // of each kind
constexpr int64_t kMostOutputs = 65536;  // more than that are logits, of which there are never many rows
constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr size_t kSumsBytes = size_t{64} << 20;
constexpr uint32_t kAlignment = 128;  // of all rows, in bytes

void check_cublas(cublasStatus_t status) {
  FS_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", cublasLtGetStatusString(status), " (",
           cublasLtGetStatusName(status), ")");
}

cudaDataType_t cuda_type(DType dtype) { return dtype == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F; }

// outputᵀ [n, m] = weight [n, k] · inputᵀ [k, m], column by column, which is how cuBLAS reads matrices.
struct Problem {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, input, output;

  Problem(DType dtype, int64_t m, int64_t n, int64_t k, int64_t ld_weight, int64_t ld_input, int64_t ld_output,
          bool wide) {
    check_cublas(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check_cublas(
        cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    check_cublas(cublasLtMatrixLayoutInit(&weight, cuda_type(dtype), k, n, ld_weight));
    check_cublas(cublasLtMatrixLayoutInit(&input, cuda_type(dtype), k, m, ld_input));
    check_cublas(cublasLtMatrixLayoutInit(&output, wide ? CUDA_R_32F : cuda_type(dtype), n, m, ld_output));
  }
};

// An algorithm that is pinned for a shape. `by_parts`: called for each of kGemmParts parts of the inputs, whose sums it
// adds in ascending order, as gemm() does; such a one may have gemm()'s very bits.
struct Algorithm {
  cublasLtMatmulAlgo_t algorithm;
  bool by_parts;
};

template <class T>
void prefer(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  check_cublas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
}

std::string name_of(const Algorithm& candidate) {
  std::ostringstream name;
  name << (candidate.by_parts ? "by parts" : "whole");
  const auto say = [&](const char* what, cublasLtMatmulAlgoConfigAttributes_t attribute) {
    uint32_t value = 0;
    size_t written = 0;
    if (cublasLtMatmulAlgoConfigGetAttribute(&candidate.algorithm, attribute, &value, sizeof value, &written) ==
        CUBLAS_STATUS_SUCCESS) {
      name << ' ' << what << ' ' << value;
    }
  };
  say("id", CUBLASLT_ALGO_CONFIG_ID);
  say("tile", CUBLASLT_ALGO_CONFIG_TILE_ID);
  say("stages", CUBLASLT_ALGO_CONFIG_STAGES_ID);
  return name.str();
}

}  // namespace

struct CublasLt::State {
  using Key = std::tuple<DType, int64_t, int64_t, bool>;  // n, k_padded, wide
  struct Shape {
    CublasReport report;
    std::vector<Algorithm> algorithms;
  };

  State() : workspace(Place::kDevice, kWorkspaceBytes), sums(Place::kDevice, kSumsBytes) {
    check_cublas(cublasLtCreate(&handle));
  }
  ~State() { static_cast<void>(cublasLtDestroy(handle)); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // No reductions over a split k, which might be in any order.
  std::vector<Algorithm> propose(Problem& problem, bool by_parts) const {
    cublasLtMatmulPreferenceOpaque_t preference;
    check_cublas(cublasLtMatmulPreferenceInit(&preference));
    prefer(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes});
    prefer(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      prefer(&preference, attribute, kAlignment);
    }
    std::array<cublasLtMatmulHeuristicResult_t, kMostCandidates> results;
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle, &problem.operation, &problem.weight, &problem.input, &problem.output,
                                       &problem.output, &preference, kMostCandidates, results.data(), &count);
    std::vector<Algorithm> found;
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return found;
    check_cublas(status);
    for (int i = 0; i < count; ++i) {
      if (results[i].state == CUBLAS_STATUS_SUCCESS) found.push_back({results[i].algo, by_parts});
    }
    return found;
  }

  // False where the algorithm is not made for such a problem.
  bool multiply(const Algorithm& algorithm, Problem& problem, const void* weight, const void* input, void* output,
                bool onto, cudaStream_t stream) const {
    const float alpha = 1.0f, beta = onto ? 1.0f : 0.0f;
    const cublasStatus_t status =
        cublasLtMatmul(handle, &problem.operation, &alpha, weight, &problem.weight, input, &problem.input, &beta,
                       output, &problem.output, output, &problem.output, &algorithm.algorithm, workspace.as<void>(),
                       workspace.bytes(), stream);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return false;
    check_cublas(status);
    return true;
  }

  // Columns [first, first + columns) of all the products of the parts, added up in `output`.
  bool add_parts(const Algorithm& algorithm, const GemmCall& call, int64_t first, int64_t columns, float* output,
                 int64_t ld_output, cudaStream_t stream) const {
    const int64_t k = call.weight.k_padded / kGemmParts;
    Problem problem(call.dtype, call.m, columns, k, call.weight.k_padded, call.ld_input, ld_output, true);
    const auto* weight = static_cast<const uint16_t*>(call.weight.data) + first * call.weight.k_padded;
    const auto* input = static_cast<const uint16_t*>(call.input);
    for (int part = 0; part < kGemmParts; ++part) {
      if (!multiply(algorithm, problem, weight + part * k, input + part * k, output, part > 0, stream)) return false;
    }
    return true;
  }

  bool run(const Algorithm& algorithm, const GemmCall& call, cudaStream_t stream) const {
    const int64_t n = call.weight.n;
    if (!algorithm.by_parts) {
      Problem problem(call.dtype, call.m, n, call.weight.k_padded, call.weight.k_padded, call.ld_input, call.ld_output,
                      call.wide);
      return multiply(algorithm, problem, call.weight.data, call.input, call.output, call.accumulate, stream);
    }
    if (call.wide && !call.accumulate && call.bias == nullptr) {
      return add_parts(algorithm, call, 0, n, static_cast<float*>(call.output), call.ld_output, stream);
    }
    // As many columns at a time as there is room for.
    const int64_t room = static_cast<int64_t>(kSumsBytes / sizeof(float)) / call.m / kPad * kPad;
    if (room == 0) return false;
    for (int64_t first = 0; first < n; first += room) {
      const int64_t columns = std::min(room, n - first), ld = round_up(columns, kPad);
      if (!add_parts(algorithm, call, first, columns, sums.as<float>(), ld, stream)) return false;
      finish_product(call, sums.as<float>(), ld, first, columns, stream);
    }
    return true;
  }

  cublasLtHandle_t handle = nullptr;
  Memory workspace, sums;
  std::map<Key, Shape> shapes;
};

CublasLt::CublasLt() : state_(std::make_unique<State>()) {}
CublasLt::~CublasLt() = default;

bool CublasLt::available() { return true; }

std::string CublasReport::text() const {
  std::ostringstream line;
  line << "products of [m, " << k_padded << "] and [" << n << ", " << k_padded << "]" << (wide ? " in float32" : "")
       << ": ";
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

const CublasReport& CublasLt::tune(DType dtype, int64_t n, int64_t k_padded, bool wide, void* workspace,
                                   cudaStream_t stream) {
  FS_CHECK(dtype != DType::kFloat32, "cuBLASLt is for products of 16-bit activations");
  const auto [entry, added] = state_->shapes.try_emplace({dtype, n, k_padded, wide});
  State::Shape& shape = entry->second;
  if (!added) return shape.report;
  shape.report = {dtype, n, k_padded, wide, {}, {}, {-1, 0, {}}};
  if (n > kMostOutputs) return shape.report;

  const int64_t most = kTimedRows.back(), ld_output = round_up(n, kPad);
  Problem whole(dtype, most, n, k_padded, k_padded, k_padded, ld_output, wide);
  shape.algorithms = state_->propose(whole, false);
  if (k_padded % (kGemmParts * kSlab) == 0) {
    Problem part(dtype, most, n, k_padded / kGemmParts, k_padded, k_padded, ld_output, true);
    for (const Algorithm& algorithm : state_->propose(part, true)) shape.algorithms.push_back(algorithm);
  }
  ProductTrials trials(dtype, n, k_padded, wide, workspace, stream);
  for (const Algorithm& algorithm : shape.algorithms) {
    shape.report.trials.push_back(trials.measure(name_of(algorithm), [&](const GemmCall& call, cudaStream_t queue) {
      return state_->run(algorithm, call, queue);
    }));
  }
  shape.report.ours = trials.ours();
  shape.report.choice = choose_product(shape.report.trials, shape.report.ours);
  return shape.report;
}

bool CublasLt::gemm(const GemmCall& call, cudaStream_t stream) {
  if (call.dtype == DType::kFloat32 || is_quantized(call.weight.format) || call.m == 0) return false;
  const auto entry = state_->shapes.find({call.dtype, call.weight.n, call.weight.k_padded, call.wide});
  if (entry == state_->shapes.end()) return false;
  const State::Shape& shape = entry->second;
  const ProductChoice& choice = shape.report.choice;
  if (choice.trial < 0 || call.m < choice.from_rows) return false;
  const Algorithm& algorithm = shape.algorithms[choice.trial];
  // A bias is added by our own kernels; a matrix either always has one or never.
  if (call.bias != nullptr && !algorithm.by_parts) return false;
  // What it was seen to do for other row counts; were it not so here, rows would change their bits.
  FS_CHECK(state_->run(algorithm, call, stream), "cuBLASLt does not multiply ", call.m, " rows by [", call.weight.n,
           ", ", call.weight.k_padded, "], as it did when it was tried");
  return true;
}

}  // namespace fastserve::cuda
