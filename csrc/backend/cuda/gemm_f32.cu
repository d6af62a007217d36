// Products of float32 activations: the plainest kernel that sums in the order that kernels.h promises.
#include "backend/cuda/gemm_epilogue.cuh"
#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/weight_element.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kRows = 8;  // of a thread: a weight is read once for so many

// A thread has one part of one column.
template <WeightFormat kFormat>
__global__ void gemm_f32_kernel(GemmCall call) {
  const int lane = static_cast<int>(threadIdx.x), part = static_cast<int>(threadIdx.y);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t read_column = column < call.weight.n ? column : call.weight.n - 1;
  const auto* rows = static_cast<const float*>(call.input) + first_row * call.ld_input;
  const int count = static_cast<int>(call.m - first_row < kRows ? call.m - first_row : kRows);
  const int slabs = static_cast<int>(call.weight.k_padded / kSlab);
  float sums[kRows] = {};
  for (int64_t i = part_begin(slabs, part) * kSlab; i < part_begin(slabs, part + 1) * kSlab; ++i) {
    const float weight = weight_element<kFormat>(call.weight, read_column, i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < count) sums[r] = fmaf(rows[r * call.ld_input + i], weight, sums[r]);
    }
  }
  float* parts = shared_memory<float>();  // [part][row][column]
#pragma unroll
  for (int r = 0; r < kRows; ++r) parts[(part * kRows + r) * kWarp + lane] = sums[r];
  __syncthreads();
  for (int r = part; r < count; r += kGemmParts) {
    float sum = parts[r * kWarp + lane];
    for (int p = 1; p < kGemmParts; ++p) sum += parts[(p * kRows + r) * kWarp + lane];
    if (column >= call.weight.n) continue;
    OutputTerms<kFormat == WeightFormat::kInt8> terms;
    terms.read(call, first_row + r, column);
    put<float>(call, first_row + r, column, terms.finish(sum));
  }
}

}  // namespace

void gemm_f32(const GemmCall& call, cudaStream_t stream) {
  const LaunchConfig config{
      dim3(static_cast<unsigned>(ceil_div(call.weight.n, kWarp)), static_cast<unsigned>(ceil_div(call.m, kRows))),
      dim3(kWarp, kGemmParts), kGemmParts * kRows * kWarp * sizeof(float), stream};
  switch (call.weight.format) {
    case WeightFormat::kFloat32:
      return launch(gemm_f32_kernel<WeightFormat::kFloat32>, config, call);
    case WeightFormat::kInt8:
      return launch(gemm_f32_kernel<WeightFormat::kInt8>, config, call);
    case WeightFormat::kQ8_0:
      return launch(gemm_f32_kernel<WeightFormat::kQ8_0>, config, call);
    case WeightFormat::kQ4_0:
      return launch(gemm_f32_kernel<WeightFormat::kQ4_0>, config, call);
    case WeightFormat::kQ4_1:
      return launch(gemm_f32_kernel<WeightFormat::kQ4_1>, config, call);
    default:
      FS_CHECK(false, "a product of float32 activations has no kernel for 16-bit weights");
  }
}

}  // namespace fastserve::cuda
