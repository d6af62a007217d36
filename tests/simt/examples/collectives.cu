// Operations of one warp, each as plainly as can be.
#include <map>

#include "backend/cuda/simt.cuh"
#include "examples/examples.h"

namespace fastserve::cuda {
namespace {

using Operation = int32_t (*)(int32_t value, int lane);

__global__ void collective_kernel(Operation operation, const int32_t* in, int32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = operation(in[lane], lane);
}

const std::map<std::string, Operation> kOperations = {
    {"shfl", [](int32_t value, int lane) { return __shfl_sync(kAllLanes, value, lane * 7); }},
    {"shfl 8", [](int32_t value, int lane) { return __shfl_sync(kAllLanes, value, lane * 7, 8); }},
    {"xor", [](int32_t value, int) { return __shfl_xor_sync(kAllLanes, value, 5); }},
    {"xor 4", [](int32_t value, int) { return __shfl_xor_sync(kAllLanes, value, 6, 4); }},
    {"up", [](int32_t value, int) { return __shfl_up_sync(kAllLanes, value, 3); }},
    {"up 8", [](int32_t value, int) { return __shfl_up_sync(kAllLanes, value, 3, 8); }},
    {"down", [](int32_t value, int) { return __shfl_down_sync(kAllLanes, value, 3); }},
    {"down 8", [](int32_t value, int) { return __shfl_down_sync(kAllLanes, value, 3, 8); }},
    {"halves",  // each half of the warp by itself
     [](int32_t value, int lane) { return __shfl_xor_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, value, 1); }},
    {"ballot", [](int32_t value, int) { return static_cast<int32_t>(__ballot_sync(kAllLanes, (value & 1) != 0)); }},
    {"any", [](int32_t value, int) { return static_cast<int32_t>(__any_sync(kAllLanes, value > 1000)); }},
    {"all", [](int32_t value, int) { return static_cast<int32_t>(__all_sync(kAllLanes, value >= 0)); }},
};

template <class T>
__global__ void multiply_kernel(const uint16_t* a, const uint16_t* b, float* d, bool swapped) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return static_cast<uint32_t>(low) | uint32_t{high} << 16; };
  const auto of_a = [&](int row, int column) { return pair(a[row * 16 + column], a[row * 16 + column + 1]); };
  const auto of_b = [&](int row) { return pair(b[row * 8 + g], b[(row + 1) * 8 + g]); };
  uint32_t left[4] = {of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8), of_a(g + 8, 2 * t + 8)};
  if (swapped) {
    const uint32_t second = left[1];
    left[1] = left[2];
    left[2] = second;
  }
  const uint32_t right[2] = {of_b(2 * t), of_b(2 * t + 8)};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  mma_16x8x16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sums[i];
}

__global__ void load_matrices_kernel(const uint16_t* a, uint16_t* out, bool transposed) {
  auto* rows = shared_memory<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  copy_async(rows + lane * 8, a + lane * 8);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t r[4];
  if (transposed) {
    load_matrices_transposed(r, rows + lane * 8);
  } else {
    load_matrices(r, rows + lane * 8);
  }
  for (int m = 0; m < 4; ++m) {
    out[(lane * 4 + m) * 2] = static_cast<uint16_t>(r[m]);
    out[(lane * 4 + m) * 2 + 1] = static_cast<uint16_t>(r[m] >> 16);
  }
}

}  // namespace

void example_collective(const std::string& name, const int32_t* in, int32_t* out, cudaStream_t stream) {
  launch(collective_kernel, {1, kWarp, 0, stream}, kOperations.at(name), in, out);
}

void example_multiply(DType dtype, const uint16_t* a, const uint16_t* b, float* d, bool swapped, cudaStream_t stream) {
  launch(dtype == DType::kBFloat16 ? multiply_kernel<Bf16> : multiply_kernel<Half>, {1, kWarp, 0, stream}, a, b, d,
         swapped);
}

void example_load_matrices(const uint16_t* a, uint16_t* out, bool transposed, cudaStream_t stream) {
  launch(load_matrices_kernel, {1, kWarp, 32 * 16, stream}, a, out, transposed);
}

}  // namespace fastserve::cuda
