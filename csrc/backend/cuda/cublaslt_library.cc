#include "backend/cuda/cublaslt_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <sstream>

#include "common/check.h"

namespace fastserve::cuda {

using namespace cublaslt;

namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr uint32_t kAlignment = 128;  // bytes

void check_status(Status status) { FS_CHECK(status == kSuccess, "cuBLASLt: status ", status); }

cudaDataType_t cuda_type(DType dtype) { return dtype == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F; }

// Where the loader looks, beside this package, among those that it was built with, and in the toolkit. The version that
// is tested with comes first.
std::vector<std::string> places() {
  constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  constexpr const char* kInWheels[] = {"/nvidia/cu13/lib/libcublasLt.so.13", "/nvidia/cublas/lib/libcublasLt.so.12"};
  std::string beside;
  Dl_info here = {};
  if (dladdr(reinterpret_cast<const void*>(&places), &here) != 0) {
    const std::string module = here.dli_fname;
    beside = module.substr(0, module.rfind('/') + 1) + "..";
  }
  std::vector<std::string> found;
  for (int i = 0; i < 2; ++i) {
    found.emplace_back(kNames[i]);
    if (!beside.empty()) found.push_back(beside + kInWheels[i]);
#ifdef FS_PYTHON_PACKAGES
    found.push_back(std::string(FS_PYTHON_PACKAGES) + kInWheels[i]);
#endif
    found.push_back(std::string("/usr/local/cuda/lib64/") + kNames[i]);
  }
  return found;
}

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, Functions& found) {
  return find(library, "cublasLtCreate", found.create) && find(library, "cublasLtDestroy", found.destroy) &&
         find(library, "cublasLtGetVersion", found.version) &&
         find(library, "cublasLtMatmulDescCreate", found.make_description) &&
         find(library, "cublasLtMatmulDescDestroy", found.drop_description) &&
         find(library, "cublasLtMatmulDescSetAttribute", found.set_description) &&
         find(library, "cublasLtMatrixLayoutCreate", found.make_layout) &&
         find(library, "cublasLtMatrixLayoutDestroy", found.drop_layout) &&
         find(library, "cublasLtMatmulPreferenceCreate", found.make_preference) &&
         find(library, "cublasLtMatmulPreferenceDestroy", found.drop_preference) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", found.set_preference) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", found.propose) &&
         find(library, "cublasLtMatmulAlgoConfigGetAttribute", found.look_at) &&
         find(library, "cublasLtMatmul", found.multiply);
}

}  // namespace

CublasLtLibrary::Product::Product(const CublasLtLibrary& library, DType dtype, int64_t m, int64_t n, int64_t k,
                                  int64_t ld_weight, int64_t ld_input, int64_t ld_output, bool wide)
    : functions_(library.functions_) {
  FS_CHECK(dtype != DType::kFloat32, "cuBLASLt is for products of 16-bit activations");
  const int32_t transposed = kTransposed;
  try {  // theirs are column by column: outputᵀ [n, m] = (weightᵀ)ᵀ [n, k] · inputᵀ [k, m]
    check_status(functions_.make_description(&description_, kCompute32F, CUDA_R_32F));
    check_status(functions_.set_description(description_, kTransposeA, &transposed, sizeof transposed));
    check_status(functions_.make_layout(&weight_, cuda_type(dtype), k, n, ld_weight));
    check_status(functions_.make_layout(&input_, cuda_type(dtype), k, m, ld_input));
    check_status(functions_.make_layout(&output_, wide ? CUDA_R_32F : cuda_type(dtype), n, m, ld_output));
  } catch (...) {
    drop();
    throw;
  }
}

void CublasLtLibrary::Product::drop() {
  for (Handle layout : {weight_, input_, output_}) {
    if (layout != nullptr) static_cast<void>(functions_.drop_layout(layout));
  }
  if (description_ != nullptr) static_cast<void>(functions_.drop_description(description_));
}

std::unique_ptr<CublasLtLibrary> CublasLtLibrary::open() {
  const char* set = std::getenv("FASTSERVE_CUBLASLT");
  const std::string named = set == nullptr ? "" : set;
  if (named == "0") return nullptr;
  for (const std::string& place : named.empty() ? places() : std::vector{named}) {
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    Functions found{};
    Handle handle = nullptr;
    if (library != nullptr && find_all(library, found) && found.create(&handle) == kSuccess) {
      return std::unique_ptr<CublasLtLibrary>(new CublasLtLibrary(found, handle));
    }
  }
  FS_CHECK(named.empty(), "FASTSERVE_CUBLASLT names '", named, "', which is not cuBLASLt or does not work here");
  return nullptr;
}

CublasLtLibrary::CublasLtLibrary(const Functions& functions, Handle handle)
    : functions_(functions), handle_(handle), workspace_(Place::kDevice, kWorkspaceBytes) {}

CublasLtLibrary::~CublasLtLibrary() { static_cast<void>(functions_.destroy(handle_)); }

std::string CublasLtLibrary::name() const { return "cuBLASLt " + std::to_string(functions_.version()); }

std::string CublasLtLibrary::name_of(const Algorithm& algorithm) const {
  std::ostringstream name;
  const auto say = [&](const char* what, int attribute) {
    uint32_t value = 0;
    size_t written = 0;
    if (functions_.look_at(&algorithm, attribute, &value, sizeof value, &written) == kSuccess) {
      name << ' ' << what << ' ' << value;
    }
  };
  say("id", kAlgorithmId);
  say("tile", kTileId);
  say("stages", kStagesId);
  return name.str();
}

std::vector<Algorithm> CublasLtLibrary::propose(const Product& product, int most, bool in_order) const {
  std::vector<Proposal> proposals(most);
  int count = 0;
  Handle preference = nullptr;
  check_status(functions_.make_preference(&preference));
  const auto status = [&]() -> Status {
    const auto prefer = [&](int attribute, auto value) {
      return functions_.set_preference(preference, attribute, &value, sizeof value);
    };
    if (const Status set = prefer(kMaxWorkspace, uint64_t{kWorkspaceBytes})) return set;
    for (int matrix = 0; matrix < 4; ++matrix) {
      if (const Status set = prefer(kFirstAlignment + matrix, kAlignment)) return set;
    }
    if (in_order) {
      if (const Status set = prefer(kReductions, uint32_t{kNoReduction})) return set;
    }
    return functions_.propose(handle_, product.description_, product.weight_, product.input_, product.output_,
                              product.output_, preference, most, proposals.data(), &count);
  }();
  static_cast<void>(functions_.drop_preference(preference));
  std::vector<Algorithm> found;
  if (status == kNotSupported) return found;
  check_status(status);
  for (int i = 0; i < count; ++i) {
    if (proposals[i].state == kSuccess) found.push_back(proposals[i].algorithm);
  }
  return found;
}

bool CublasLtLibrary::multiply(const Algorithm& algorithm, const Product& product, const void* weight,
                               const void* input, void* output, bool onto, cudaStream_t stream) const {
  const float alpha = 1.0f, beta = onto ? 1.0f : 0.0f;
  const Status status = functions_.multiply(handle_, product.description_, &alpha, weight, product.weight_, input,
                                            product.input_, &beta, output, product.output_, output, product.output_,
                                            &algorithm, workspace_.as<void>(), workspace_.bytes(), stream);
  if (status == kNotSupported || status == kInvalidValue) return false;
  check_status(status);
  return true;
}

}  // namespace fastserve::cuda
