#include "backend/cuda/reference_products.h"

#include <dlfcn.h>

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

namespace {

// The part of the library's interface that is used, as its documentation has it.
using Handle = void*;
using Status = int;
constexpr int kCompute32F = 68, kTransposed = 1;
constexpr int kTransposeA = 3;      // of a product's description
constexpr int kWorkspaceBytes = 1;  // of a preference
constexpr size_t kWorkspace = size_t{64} << 20;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  Status (*create)(Handle* handle);
  Status (*destroy)(Handle handle);
  size_t (*version)();
  Status (*make_product)(Handle* product, int compute, cudaDataType_t scale);
  Status (*drop_product)(Handle product);
  Status (*set_product)(Handle product, int attribute, const void* value, size_t bytes);
  Status (*make_layout)(Handle* layout, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*drop_layout)(Handle layout);
  Status (*make_preference)(Handle* preference);
  Status (*drop_preference)(Handle preference);
  Status (*set_preference)(Handle preference, int attribute, const void* value, size_t bytes);
  Status (*choose)(Handle handle, Handle product, Handle a, Handle b, Handle c, Handle d, Handle preference, int wanted,
                   Heuristic* found, int* count);
  Status (*multiply)(Handle handle, Handle product, const void* alpha, const void* a, Handle a_layout, const void* b,
                     Handle b_layout, const void* beta, const void* c, Handle c_layout, void* d, Handle d_layout,
                     const Algorithm* algorithm, void* workspace, size_t bytes, cudaStream_t stream);
};

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool load(void* library, Library& found) {
  return find(library, "cublasLtCreate", found.create) && find(library, "cublasLtDestroy", found.destroy) &&
         find(library, "cublasLtGetVersion", found.version) &&
         find(library, "cublasLtMatmulDescCreate", found.make_product) &&
         find(library, "cublasLtMatmulDescDestroy", found.drop_product) &&
         find(library, "cublasLtMatmulDescSetAttribute", found.set_product) &&
         find(library, "cublasLtMatrixLayoutCreate", found.make_layout) &&
         find(library, "cublasLtMatrixLayoutDestroy", found.drop_layout) &&
         find(library, "cublasLtMatmulPreferenceCreate", found.make_preference) &&
         find(library, "cublasLtMatmulPreferenceDestroy", found.drop_preference) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", found.set_preference) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", found.choose) &&
         find(library, "cublasLtMatmul", found.multiply);
}

void check_status(Status status) { FS_CHECK(status == 0, "cuBLASLt: status ", status); }

class Loaded final : public ReferenceProducts {
 public:
  explicit Loaded(const Library& library) : library_(library), workspace_(Place::kDevice, kWorkspace) {
    check_status(library_.create(&handle_));
  }
  ~Loaded() override {
    drop();
    static_cast<void>(library_.destroy(handle_));
  }

  std::string name() const override { return "cuBLASLt " + std::to_string(library_.version()); }

  // Theirs are column by column: output ᵀ[n, m] = (weightᵀ)ᵀ · inputᵀ.
  void prepare(int64_t m, int64_t n, int64_t k, cudaDataType_t type) override {
    drop();
    check_status(library_.make_product(&product_, kCompute32F, CUDA_R_32F));
    const int32_t transposed = kTransposed;
    check_status(library_.set_product(product_, kTransposeA, &transposed, sizeof transposed));
    check_status(library_.make_layout(&weight_, type, k, n, k));
    check_status(library_.make_layout(&input_, type, k, m, k));
    check_status(library_.make_layout(&output_, type, n, m, n));
    Handle preference = nullptr;
    check_status(library_.make_preference(&preference));
    Heuristic found{};
    int count = 0;
    const Status set = library_.set_preference(preference, kWorkspaceBytes, &kWorkspace, sizeof kWorkspace);
    const Status chosen =
        set != 0 ? set
                 : library_.choose(handle_, product_, weight_, input_, output_, output_, preference, 1, &found, &count);
    static_cast<void>(library_.drop_preference(preference));
    check_status(chosen);
    FS_CHECK(count > 0, "cuBLASLt has no product of [", m, ", ", k, "] and [", n, ", ", k, "]");
    algorithm_ = found.algorithm;
  }

  void run(const void* input, const void* weight, void* output, cudaStream_t stream) override {
    const float one = 1, zero = 0;
    check_status(library_.multiply(handle_, product_, &one, weight, weight_, input, input_, &zero, output, output_,
                                   output, output_, &algorithm_, workspace_.as<void>(), workspace_.bytes(), stream));
  }

 private:
  void drop() {
    for (Handle* layout : {&weight_, &input_, &output_}) {
      if (*layout != nullptr) static_cast<void>(library_.drop_layout(*layout));
      *layout = nullptr;
    }
    if (product_ != nullptr) static_cast<void>(library_.drop_product(product_));
    product_ = nullptr;
  }

  const Library library_;
  Memory workspace_;
  Handle handle_ = nullptr, product_ = nullptr, weight_ = nullptr, input_ = nullptr, output_ = nullptr;
  Algorithm algorithm_{};
};

}  // namespace

std::unique_ptr<ReferenceProducts> ReferenceProducts::open() {
  for (const char* file : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    Library found{};
    if (library != nullptr && load(library, found)) return std::make_unique<Loaded>(found);
  }
  return nullptr;
}

}  // namespace fastserve::cuda
