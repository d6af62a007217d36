// RMS norm and layer norm. A block takes one row and keeps it in registers, so that it is read once.
#include "backend/cuda/kernels.h"
#include "backend/cuda/reduce.cuh"
#include "backend/cuda/vector.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kStep = 4;  // columns that a thread takes together

// Columns [column, column + kStep) of a vector [width] without padding.
__device__ __forceinline__ void load_columns(float (&values)[kStep], const float* from, int column, int width) {
  if (column + kStep <= width) return load(values, from + column);
#pragma unroll
  for (int i = 0; i < kStep; ++i) values[i] = column + i < width ? from[column + i] : 0.0f;
}

// Blocks of the widest rows always have kMaxThreads: offsets known to the compiler need no registers.
template <int kSteps>
constexpr bool kFull = kSteps > 4;

// Each thread has kSteps steps, blockDim.x steps apart. The sums' order follows from the width, which alone decides
// about blockDim.x and kSteps.
template <class T, int kSteps, bool kCentered>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(NormCall call) {
  begin_after_predecessor();
  auto* scratch = shared_memory<float>();
  const int64_t row = blockIdx.x;
  const int width = static_cast<int>(call.width);
  const float* input = call.input + (call.order != nullptr ? call.order[row] : row) * call.ld;
  const int threads = kFull<kSteps> ? kMaxThreads : static_cast<int>(blockDim.x);
  const auto column_of = [&](int step) { return (step * threads + static_cast<int>(threadIdx.x)) * kStep; };

  float x[kSteps][kStep];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (column_of(s) < width) {
      load(x[s], input + column_of(s));
    } else {
      for (float& value : x[s]) value = 0.0f;
    }
  }
  if constexpr (kCentered) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) sum += (x[s][0] + x[s][1]) + (x[s][2] + x[s][3]);
    const float mean = block_reduce(sum, 0.0f, Sum{}, scratch) / static_cast<float>(width);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) x[s][i] = column_of(s) + i < width ? x[s][i] - mean : 0.0f;
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < kStep; ++i) squares = fmaf(x[s][i], x[s][i], squares);
  }
  squares = block_reduce(squares, 0.0f, Sum{}, scratch);
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(width) + call.eps);

  T* output = static_cast<T*>(call.output) + row * call.ld;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if constexpr (kFull<kSteps>)
      __syncwarp();  // or weights of all steps are loaded at once, for which registers are few
    const int column = column_of(s);
    if (column >= width) continue;
    float weight[kStep];
    load_columns(weight, call.weight, column, width);
    if constexpr (kCentered) {
      float bias[kStep];
      load_columns(bias, call.bias, column, width);
#pragma unroll
      for (int i = 0; i < kStep; ++i) x[s][i] = fmaf(x[s][i] * inverse, weight[i], bias[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kStep; ++i) x[s][i] = x[s][i] * inverse * weight[i];
    }
    if (column + kStep <= width) {
      store(output + column, x[s]);
    } else {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (column + i < width) output[column + i] = narrow<T>(x[s][i]);
      }
    }
  }
}

template <class T, int kSteps>
void launch_norm(const NormCall& call, cudaStream_t stream) {
  const int64_t threads = kFull<kSteps> ? kMaxThreads : round_up(ceil_div(call.width, kStep * kSteps), kWarp);
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(call.rows)),
                            .block = dim3(static_cast<unsigned>(threads)),
                            .shared_bytes = kWarp * sizeof(float),
                            .stream = stream,
                            .early = true};
  if (call.bias != nullptr) {
    launch(norm_kernel<T, kSteps, true>, config, call);
  } else {
    launch(norm_kernel<T, kSteps, false>, config, call);
  }
}

template <class T>
void norm_rows(const NormCall& call, cudaStream_t stream) {
  // Two loads in flight a thread, and more where threads run out.
  if (call.width <= kMaxThreads * kStep * 2) return launch_norm<T, 2>(call, stream);
  if (call.width <= kMaxThreads * kStep * 4) return launch_norm<T, 4>(call, stream);
  FS_CHECK(call.width <= kMaxThreads * kStep * 8, "a row of ", call.width, " is wider than ", kMaxThreads * kStep * 8,
           ", which is what the registers of a block hold");
  launch_norm<T, 8>(call, stream);
}

}  // namespace

void norm(const NormCall& call, cudaStream_t stream) {
  if (call.rows == 0) return;
  switch (call.dtype) {
    case DType::kFloat32:
      return norm_rows<float>(call, stream);
    case DType::kBFloat16:
      return norm_rows<Bf16>(call, stream);
    case DType::kFloat16:
      return norm_rows<Half>(call, stream);
  }
}

}  // namespace fastserve::cuda
