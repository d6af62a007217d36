// A stand-in for libcublasLt.so on the fake runtime's streams. It knows three algorithms: one whose sums are
// rougher for many rows, one that is not made for 512 rows, and one that does what it should, in an order of its own.
#include <atomic>
#include <cstring>
#include <map>
#include <vector>

#include "backend/cuda/cublaslt_library.h"
#include "fake_cudart/device.h"
#include "machine/machine.h"

using namespace fastserve::cuda::cublaslt;
using fake_cudart::Device;
using fake_cudart::Task;
using fastserve::Bf16;
using fastserve::Half;

namespace {

constexpr Status kNotInitialized = 1;
constexpr uint64_t kUnsteady = 7, kPicky = 8, kRight = 9, kSplitting = 10;  // algorithms

std::atomic<int> live = 0;       // handles
std::atomic<int> proposals = 0;  // that were asked for
std::atomic<int> products = 0;   // that were queued

struct Attributes {
  std::map<int, uint64_t> values;
};
struct Layout {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t ld;

  int64_t element() const { return type == CUDA_R_32F ? 4 : 2; }
  int64_t bytes() const { return (static_cast<int64_t>(columns - 1) * ld + static_cast<int64_t>(rows)) * element(); }
};

template <class T>
Status make(Handle* handle, T value) {
  *handle = new T(std::move(value));
  ++live;
  return kSuccess;
}
template <class T>
Status drop(Handle handle) {
  if (handle == nullptr) return kInvalidValue;
  delete static_cast<T*>(handle);
  --live;
  return kSuccess;
}
Status set(Handle handle, int attribute, const void* value, size_t bytes) {
  if (bytes > sizeof(uint64_t)) return kInvalidValue;
  uint64_t& held = static_cast<Attributes*>(handle)->values[attribute];
  held = 0;
  std::memcpy(&held, value, bytes);
  return kSuccess;
}

float value_of(cudaDataType_t type, const char* at) {
  if (type == CUDA_R_32F) return *reinterpret_cast<const float*>(at);
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(at);
  return type == CUDA_R_16BF ? fastserve::to_float(Bf16{bits}) : fastserve::half_to_float(bits);
}
void store(cudaDataType_t type, float value, char* at) {
  if (type == CUDA_R_32F) {
    *reinterpret_cast<float*>(at) = value;
  } else {
    *reinterpret_cast<uint16_t*>(at) =
        type == CUDA_R_16BF ? fastserve::to_bf16(value).bits : fastserve::to_half(value).bits;
  }
}
std::vector<float> values_of(const Layout& layout, const char* at) {
  std::vector<float> values(layout.rows * layout.columns);
  for (uint64_t j = 0; j < layout.columns; ++j) {
    for (uint64_t i = 0; i < layout.rows; ++i) {
      values[j * layout.rows + i] = value_of(layout.type, at + (j * layout.ld + i) * layout.element());
    }
  }
  return values;
}

// d [n, m] = aᵀ · b (+ d), column by column, of a [k, n] and b [k, m].
void multiply(uint64_t algorithm, const Layout& a_layout, const char* a, const Layout& b_layout, const char* b,
              bool onto, const Layout& d_layout, char* d) {
  const std::vector<float> weight = values_of(a_layout, a), input = values_of(b_layout, b);
  const uint64_t k = a_layout.rows;
  const float rough = algorithm == kUnsteady && d_layout.columns >= 100 ? 1.0f + 0x1p-7f : 1.0f;
  for (uint64_t j = 0; j < d_layout.columns; ++j) {
    for (uint64_t i = 0; i < d_layout.rows; ++i) {
      const float *row = &weight[i * k], *column = &input[j * k];
      float sum = 0.0f;
      for (uint64_t x = 0; x < k; ++x) sum += row[x] * column[x];
      sum *= rough;
      char* to = d + (j * d_layout.ld + i) * d_layout.element();
      store(d_layout.type, onto ? value_of(d_layout.type, to) + sum : sum, to);
    }
  }
}

bool aligned(const void* data, const Layout& layout) {
  return reinterpret_cast<uintptr_t>(data) % 128 == 0 && layout.ld * layout.element() % 128 == 0;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED Status cublasLtCreate(Handle* library) { return make(library, Attributes{}); }
EXPORTED Status cublasLtDestroy(Handle library) { return drop<Attributes>(library); }
EXPORTED size_t cublasLtGetVersion() { return 130000; }
EXPORTED Status cublasLtMatmulDescCreate(Handle* description, int compute, cudaDataType_t scale) {
  if (compute != kCompute32F || scale != CUDA_R_32F) return kNotSupported;
  return make(description, Attributes{});
}
EXPORTED Status cublasLtMatmulDescDestroy(Handle description) { return drop<Attributes>(description); }
EXPORTED Status cublasLtMatmulDescSetAttribute(Handle description, int attribute, const void* value, size_t bytes) {
  return set(description, attribute, value, bytes);
}
EXPORTED Status cublasLtMatrixLayoutCreate(Handle* layout, cudaDataType_t type, uint64_t rows, uint64_t columns,
                                           int64_t ld) {
  if (rows == 0 || columns == 0 || ld < static_cast<int64_t>(rows)) return kInvalidValue;
  return make(layout, Layout{type, rows, columns, ld});
}
EXPORTED Status cublasLtMatrixLayoutDestroy(Handle layout) { return drop<Layout>(layout); }
EXPORTED Status cublasLtMatmulPreferenceCreate(Handle* preference) { return make(preference, Attributes{}); }
EXPORTED Status cublasLtMatmulPreferenceDestroy(Handle preference) { return drop<Attributes>(preference); }
EXPORTED Status cublasLtMatmulPreferenceSetAttribute(Handle preference, int attribute, const void* value,
                                                     size_t bytes) {
  return set(preference, attribute, value, bytes);
}

EXPORTED Status cublasLtMatmulAlgoGetHeuristic(Handle library, Handle, Handle, Handle, Handle, Handle,
                                               Handle preference, int wanted, Proposal* found, int* count) {
  if (library == nullptr) return kNotInitialized;
  ++proposals;
  const auto& preferred = static_cast<const Attributes*>(preference)->values;
  std::vector<uint64_t> known{kUnsteady, kPicky, kRight};
  if (preferred.count(kReductions) == 0) known.insert(known.begin(), kSplitting);
  *count = 0;
  for (const uint64_t each : known) {
    if (*count < wanted) found[(*count)++] = {{{each}}, 0, kSuccess, 1.0f, {}};
  }
  return kSuccess;
}

EXPORTED Status cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* value,
                                                     size_t bytes, size_t* written) {
  if (attribute != kAlgorithmId || bytes != sizeof(uint32_t)) return kNotSupported;
  const auto id = static_cast<uint32_t>(algorithm->data[0]);
  std::memcpy(value, &id, *written = sizeof id);
  return kSuccess;
}

EXPORTED Status cublasLtMatmul(Handle library, Handle description, const void* alpha, const void* a, Handle a_layout,
                               const void* b, Handle b_layout, const void* beta, const void* c, Handle c_layout,
                               void* d, Handle d_layout, const Algorithm* algorithm, void*, size_t,
                               cudaStream_t stream) {
  if (library == nullptr) return kNotInitialized;
  const Layout weight = *static_cast<Layout*>(a_layout), input = *static_cast<Layout*>(b_layout);
  const Layout output = *static_cast<Layout*>(d_layout);
  const auto& attributes = static_cast<const Attributes*>(description)->values;
  const auto transposed = attributes.find(kTransposeA);
  if (transposed == attributes.end() || transposed->second != kTransposed || c != d || c_layout != d_layout ||
      *static_cast<const float*>(alpha) != 1.0f || weight.rows != input.rows || weight.columns != output.rows ||
      input.columns != output.columns) {
    return kInvalidValue;
  }
  if (!aligned(a, weight) || !aligned(b, input) || !aligned(d, output)) return kInvalidValue;
  const uint64_t id = algorithm->data[0];
  if (id == kPicky && output.columns == 512) return kNotSupported;
  ++products;
  const bool onto = *static_cast<const float*>(beta) != 0.0f;
  fake_cudart::enter("cublasLtMatmul", [&](Device& self, Device::Lock&) {
    const char *from = static_cast<const char*>(a), *times = static_cast<const char*>(b);
    char* to = static_cast<char*>(d);
    Task task;
    task.name = "cublasLtMatmul";
    task.ranges = {
        {from, from + weight.bytes(), false}, {times, times + input.bytes(), false}, {to, to + output.bytes(), true}};
    for (const auto& range : task.ranges) self.check_bounds(task.name, range.begin, range.end - range.begin);
    task.action = [=] { multiply(id, weight, from, input, times, onto, output, to); };
    self.submit(self.stream(stream), std::move(task));
    return cudaSuccess;
  });
  return kSuccess;
}

// For tests: handles that nobody has dropped, algorithms asked for and products queued so far.
EXPORTED int fastserve_simt_cublaslt_live() { return live; }
EXPORTED int fastserve_simt_cublaslt_proposals() { return proposals; }
EXPORTED int fastserve_simt_cublaslt_products() { return products; }
