// Embedding, activation and sums: what touches each element once.
#include "backend/cuda/activation.cuh"
#include "backend/cuda/kernels.h"
#include "backend/cuda/vector.cuh"
#include "backend/cuda/weight_element.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kEmbedStep = 8;  // elements that a thread takes together

unsigned blocks_of(int64_t items) { return static_cast<unsigned>(ceil_div(items, kThreads)); }

template <WeightFormat kFormat>
__device__ __forceinline__ void load_weights(float (&x)[kEmbedStep], const DeviceMatrix& table, int64_t row,
                                             int64_t column) {
  if constexpr (kFormat == WeightFormat::kFloat32) {
    load(x, static_cast<const float*>(table.data) + row * table.k_padded + column);
  } else if constexpr (kFormat == WeightFormat::kBFloat16) {
    load(x, static_cast<const Bf16*>(table.data) + row * table.k_padded + column);
  } else if constexpr (kFormat == WeightFormat::kFloat16) {
    load(x, static_cast<const Half*>(table.data) + row * table.k_padded + column);
  } else {
    const float scale = channel_scale<kFormat>(table, row);
#pragma unroll
    for (int i = 0; i < kEmbedStep; ++i) {
      const float weight = column + i < table.k ? weight_element<kFormat>(table, row, column + i) : 0.0f;
      x[i] = kFormat == WeightFormat::kInt8 ? weight * scale : weight;
    }
  }
}

// Grid: (tokens, steps of a row).
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads) embed_kernel(EmbedCall call) {
  const int64_t token = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kEmbedStep;
  if (column >= call.table.k) return;
  int32_t id = call.ids[token];
  if (id < 0 && call.last_sampled != nullptr) id = call.last_sampled[-1 - id];
  const bool here = id >= call.first && id < call.first + call.count;
  if (call.accumulate && !here) return;
  float x[kEmbedStep] = {};
  if (here) load_weights<kFormat>(x, call.table, id - call.first, column);
  float* output = call.output + token * call.ld + column;
  if (call.accumulate) {
    float y[kEmbedStep];
    load(y, output);
#pragma unroll
    for (int i = 0; i < kEmbedStep; ++i) x[i] += y[i];
  }
  store(output, x);
}

// Grid: (tokens, steps of a row). Columns of the padding are zero, and so is what comes of them.
template <class T, Activation kKind, bool kGated>
__global__ void __launch_bounds__(kThreads) activate_kernel(T* x, int64_t width, int64_t ld, int64_t to_gate) {
  begin_after_predecessor();
  constexpr int kStep = kVector<T>;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kStep;
  if (column >= width) return;
  T* at = x + blockIdx.x * ld + column;
  float value[kStep], gate[kStep];
  load(value, at);
  if constexpr (kGated) load(gate, at + to_gate);
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    value[i] = activated<kKind>(value[i]);
    if constexpr (kGated) value[i] *= gate[i];
  }
  store(at, value);
}

template <class T, Activation kKind>
void launch_activate(bool gated, void* x, int64_t tokens, int64_t width, int64_t ld, cudaStream_t stream) {
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(tokens), blocks_of(ceil_div(width, kVector<T>))),
                            .block = dim3(kThreads),
                            .shared_bytes = 0,
                            .stream = stream,
                            .early = true};
  if (gated) {
    launch(activate_kernel<T, kKind, true>, config, static_cast<T*>(x), width, ld, round_up(width, kPad));
  } else {
    launch(activate_kernel<T, kKind, false>, config, static_cast<T*>(x), width, ld, round_up(width, kPad));
  }
}

template <class T>
void activate_rows(Activation kind, bool gated, void* x, int64_t tokens, int64_t width, int64_t ld,
                   cudaStream_t stream) {
  switch (kind) {
    case Activation::kSilu:
      return launch_activate<T, Activation::kSilu>(gated, x, tokens, width, ld, stream);
    case Activation::kGelu:
      return launch_activate<T, Activation::kGelu>(gated, x, tokens, width, ld, stream);
    case Activation::kGeluTanh:
      return launch_activate<T, Activation::kGeluTanh>(gated, x, tokens, width, ld, stream);
    case Activation::kRelu:
      return launch_activate<T, Activation::kRelu>(gated, x, tokens, width, ld, stream);
  }
}

__global__ void __launch_bounds__(kThreads) add_kernel(const float* input, float* output, int64_t count) {
  constexpr int kStep = kVector<float>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStep;
  if (first + kStep <= count) {
    float x[kStep], y[kStep];
    load(x, input + first);
    load(y, output + first);
#pragma unroll
    for (int i = 0; i < kStep; ++i) y[i] += x[i];
    store(output + first, y);
  } else {
    for (int64_t i = first; i < count; ++i) output[i] += input[i];
  }
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const uint32_t* from, uint32_t* to, int64_t words) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (first + 4 <= words) {
    *reinterpret_cast<uint4*>(to + first) = *reinterpret_cast<const uint4*>(from + first);
  } else {
    for (int64_t i = first; i < words; ++i) to[i] = from[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int64_t ranks, int64_t count, float* output) {
  constexpr int kStep = kVector<float>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStep;
  if (first >= count) return;
  float sum[kStep], part[kStep];
  load(sum, parts + first);
  for (int64_t rank = 1; rank < ranks; ++rank) {
    load(part, parts + rank * count + first);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum[i] += part[i];
  }
  store(output + first, sum);
}

}  // namespace

void embed(const EmbedCall& call, cudaStream_t stream) {
  if (call.tokens == 0) return;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(call.tokens), blocks_of(ceil_div(call.table.k, kEmbedStep))),
      .block = dim3(kThreads),
      .shared_bytes = 0,
      .stream = stream};
  switch (call.table.format) {
    case WeightFormat::kFloat32:
      return launch(embed_kernel<WeightFormat::kFloat32>, config, call);
    case WeightFormat::kBFloat16:
      return launch(embed_kernel<WeightFormat::kBFloat16>, config, call);
    case WeightFormat::kFloat16:
      return launch(embed_kernel<WeightFormat::kFloat16>, config, call);
    case WeightFormat::kInt8:
      return launch(embed_kernel<WeightFormat::kInt8>, config, call);
    case WeightFormat::kQ8_0:
      return launch(embed_kernel<WeightFormat::kQ8_0>, config, call);
    case WeightFormat::kQ4_0:
      return launch(embed_kernel<WeightFormat::kQ4_0>, config, call);
    case WeightFormat::kQ4_1:
      return launch(embed_kernel<WeightFormat::kQ4_1>, config, call);
  }
}

void activate(DType dtype, Activation kind, bool gated, void* x, int64_t tokens, int64_t width, int64_t ld,
              cudaStream_t stream) {
  if (tokens == 0) return;
  switch (dtype) {
    case DType::kFloat32:
      return activate_rows<float>(kind, gated, x, tokens, width, ld, stream);
    case DType::kBFloat16:
      return activate_rows<Bf16>(kind, gated, x, tokens, width, ld, stream);
    case DType::kFloat16:
      return activate_rows<Half>(kind, gated, x, tokens, width, ld, stream);
  }
}

void copy_words(const void* from, void* to, int64_t bytes, cudaStream_t stream) {
  FS_CHECK(bytes % 4 == 0, "whole words are copied, not ", bytes, " bytes");
  if (bytes == 0) return;
  launch(copy_kernel,
         {.grid = dim3(blocks_of(ceil_div(bytes, 16))), .block = dim3(kThreads), .shared_bytes = 0, .stream = stream},
         static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), bytes / 4);
}

void add(const float* input, float* output, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  launch(add_kernel,
         {.grid = dim3(blocks_of(ceil_div(count, kVector<float>))),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .stream = stream},
         input, output, count);
}

void sum_parts(const float* parts, int64_t ranks, int64_t count, float* output, cudaStream_t stream) {
  if (count == 0) return;
  launch(sum_parts_kernel,
         {.grid = dim3(blocks_of(ceil_div(count, kVector<float>))),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .stream = stream},
         parts, ranks, count, output);
}

}  // namespace fastserve::cuda
