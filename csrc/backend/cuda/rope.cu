// Rotation of queries and keys, per-head norm before it where the model has one, and the way of keys and values into
// the paged pool. A group of lanes takes one head of one token.
#include "backend/cuda/kernels.h"
#include "backend/cuda/reduce.cuh"
#include "backend/cuda/vector.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void rotation_kernel(const int32_t* positions, int64_t tokens, const float* inv_freq, int64_t half,
                                float scale, float* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= tokens * half) return;
  const int64_t token = index / half, i = index % half;
  const float angle = static_cast<float>(positions[token]) * inv_freq[i];
  float* to = out + token * 2 * half + i;
  to[0] = cosf(angle) * scale;
  to[half] = sinf(angle) * scale;
}

// The vectors of a head, N elements each, go in couples: (i, i + half) first, which are rotated, then neighbours of
// those that are not; the very last of these may be alone.
struct Couples {
  int half;     // vectors that have a partner to rotate with
  int vectors;  // in all
  __device__ __forceinline__ int count() const { return half + (vectors - 2 * half + 1) / 2; }
  __device__ __forceinline__ int first(int couple) const { return couple < half ? couple : 2 * couple; }
  __device__ __forceinline__ int second(int couple) const { return couple < half ? couple + half : 2 * couple + 1; }
};

template <int N>
__device__ __forceinline__ float add_squares(const float (&x)[N], float sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

template <int N>
__device__ __forceinline__ void scale(float (&x)[N], float inverse, const float* weight) {
  float w[N];
  load(w, weight);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = x[i] * inverse * w[i];
}

// One layer of the pool, in elements.
struct PoolLayer {
  int64_t first;   // from the pool's base on
  int64_t block;   // from one block to the next
  int64_t matrix;  // from K of a head to its V, and from that to K of the next head
  int padded;      // from one slot to the next
};

// Grid: (tokens, heads of all three kinds in steps of kThreads / lanes).
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(RopeAndStoreCall call, DeviceBatch batch, PoolLayer pool, int lanes) {
  begin_after_predecessor();
  const int64_t token = blockIdx.x;
  const int32_t row_index = batch.token_rows[token];
  if (row_index < 0) return;  // it only fills the batch up
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int head = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) / lanes;
  const int num_heads = static_cast<int>(call.num_heads), kv_heads = static_cast<int>(call.pool.num_kv_heads);
  const int head_dim = static_cast<int>(call.pool.head_dim);
  const bool exists = head < num_heads + 2 * kv_heads;
  const bool query = head < num_heads, value = head >= num_heads + kv_heads;
  const int half = call.cos_sin != nullptr ? static_cast<int>(call.rotary_half) : 0;
  const Couples couples{.half = value ? 0 : half / N, .vectors = head_dim / N};

  T* from = static_cast<T*>(call.qkv) + token * call.ld + static_cast<int64_t>(head) * head_dim;
  T* to = from;
  if (exists && !query) {
    const BatchRow row = batch.rows[row_index];
    const int position = row.start + static_cast<int>(token) - row.first;
    const int block_size = static_cast<int>(call.pool.block_size), slot = position % block_size;
    const int64_t block = batch.tables[row.table + position / block_size];
    const int64_t matrix = value ? 2 * (head - num_heads - kv_heads) + 1 : 2 * (head - num_heads);
    to = static_cast<T*>(call.pool.base) + pool.first + block * pool.block + matrix * pool.matrix +
         static_cast<int64_t>(slot) * pool.padded;
    for (int i = head_dim + lane; i < pool.padded; i += lanes) to[i] = narrow<T>(0.0f);
  }

  const float* weight = query ? call.q_norm : value ? nullptr : call.k_norm;
  float inverse = 1.0f;
  if (call.q_norm != nullptr || call.k_norm != nullptr) {  // for the whole warp alike
    float sum = 0.0f;
    for (int couple = lane; exists && couple < couples.count(); couple += lanes) {
      float x[N];
      load(x, from + couples.first(couple) * N);
      sum = add_squares(x, sum);
      if (couples.second(couple) >= couples.vectors) continue;
      load(x, from + couples.second(couple) * N);
      sum = add_squares(x, sum);
    }
    sum = warp_reduce(sum, Sum{}, lanes);
    inverse = 1.0f / sqrtf(sum / static_cast<float>(head_dim) + call.eps);
  }

  const float* cos = call.cos_sin + token * 2 * half;
  const float* sin = cos + half;
  for (int couple = lane; exists && couple < couples.count(); couple += lanes) {
    const int first = couples.first(couple) * N, second = couples.second(couple) * N;
    const bool pair = second < head_dim, rotated = couple < couples.half;
    if (query && !rotated && weight == nullptr) continue;  // stays as it is
    float a[N], b[N] = {};
    load(a, from + first);
    if (pair) load(b, from + second);
    if (weight != nullptr) {
      scale(a, inverse, weight + first);
      if (pair) scale(b, inverse, weight + second);
    }
    if (rotated) {
      float c[N], s[N];
      load(c, cos + first);
      load(s, sin + first);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x = a[i], y = b[i];
        a[i] = x * c[i] - y * s[i];
        b[i] = y * c[i] + x * s[i];
      }
    }
    store(to + first, a);
    if (pair) store(to + second, b);
  }
}

template <class T, int N>
void launch_rope(const RopeAndStoreCall& call, const DeviceBatch& batch, cudaStream_t stream) {
  const int64_t couples = ceil_div(call.pool.head_dim, 2 * N);
  int lanes = 1;
  while (lanes < couples && lanes < kWarp) lanes *= 2;
  const int64_t heads = call.num_heads + 2 * call.pool.num_kv_heads;
  const PoolLayer pool{.first = call.layer * call.pool.layer_elements(),
                       .block = call.pool.block_elements(),
                       .matrix = call.pool.head_elements(),
                       .padded = static_cast<int>(call.pool.head_dim_padded())};
  launch(
      rope_kernel<T, N>,
      {.grid = dim3(static_cast<unsigned>(batch.num_tokens), static_cast<unsigned>(ceil_div(heads * lanes, kThreads))),
       .block = dim3(kThreads),
       .shared_bytes = 0,
       .stream = stream,
       .early = true},
      call, batch, pool, lanes);
}

template <class T>
void rope_heads(const RopeAndStoreCall& call, const DeviceBatch& batch, cudaStream_t stream) {
  const int64_t half = call.cos_sin != nullptr ? call.rotary_half : 0;
  if (call.pool.head_dim % kVector<T> == 0 && half % kVector<T> == 0) {
    launch_rope<T, kVector<T>>(call, batch, stream);
  } else {
    launch_rope<T, 1>(call, batch, stream);
  }
}

}  // namespace

void rotation_table(const int32_t* positions, int64_t tokens, const float* inv_freq, int64_t half, float scale,
                    float* out, cudaStream_t stream) {
  if (tokens * half == 0) return;
  launch(rotation_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(tokens * half, kThreads))),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .stream = stream},
         positions, tokens, inv_freq, half, scale, out);
}

void rope_and_store(const RopeAndStoreCall& call, const DeviceBatch& batch, cudaStream_t stream) {
  if (batch.num_tokens == 0) return;
  switch (call.dtype) {
    case DType::kFloat32:
      return rope_heads<float>(call, batch, stream);
    case DType::kBFloat16:
      return rope_heads<Bf16>(call, batch, stream);
    case DType::kFloat16:
      return rope_heads<Half>(call, batch, stream);
  }
}

}  // namespace fastserve::cuda
