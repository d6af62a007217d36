// What a kernel and its host function look like, in small: c[i] = a[i] + b[i].
#include "backend/cuda/simt.cuh"
#include "examples/examples.h"

namespace fastserve::cuda {
namespace {

constexpr int kThreads = 64;

template <class T>
__global__ void __launch_bounds__(kThreads) add_kernel(const T* a, const T* b, T* c, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) c[i] = narrow<T>(widen(a[i]) + widen(b[i]));
}

}  // namespace

void example_add(DType dtype, const void* a, const void* b, void* c, int64_t count, cudaStream_t stream) {
  const auto start = [&](auto element) {
    using T = decltype(element);
    launch(add_kernel<T>, {static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream},
           static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), count);
  };
  if (dtype == DType::kFloat32) return start(float{});
  if (dtype == DType::kBFloat16) return start(Bf16{});
  start(Half{});
}

}  // namespace fastserve::cuda
