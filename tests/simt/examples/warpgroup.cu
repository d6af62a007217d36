// Products of one warpgroup and copies of tiles between two blocks, each as plainly as can be, and with mistakes
// planted.
#include <map>

#include "backend/cuda/hopper.cuh"
#include "backend/cuda/tensor_map.h"
#include "examples/examples.h"

namespace fastserve::cuda {
namespace {

constexpr int kPattern = 1024;

__device__ char* aligned(char* shared) {
  const uint32_t past = shared_address(shared) % kPattern;
  return shared + (past == 0 ? 0 : kPattern - past);
}

enum class Product { kRight, kNoWait, kNoCommit, kNoFence, kChangedAfterFence, kChangedUnderWay, kOverwritten, kLeft };

// d [64, kColumns] += A · Bᵀ, each of `steps` times 16 inputs, both in an image of shared memory.
template <class T, int kColumns, Product kHow>
__global__ void product_kernel(const unsigned char* image, int bytes, OperandPlace a, OperandPlace b, int steps,
                               float* d) {
  char* shared = aligned(shared_memory<char>());
  const int thread = static_cast<int>(threadIdx.x), w = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
  for (int i = thread; i < bytes; i += kWarpgroup) shared[i] = static_cast<char>(image[i]);
  __syncthreads();
  float sums[kColumns / 2];
  const auto place = [&](int i) { return (16 * w + g + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + 2 * t + i % 2; };
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = d[place(i)];
  if (kHow != Product::kNoFence) fence_sums(sums);
  if (kHow == Product::kChangedAfterFence) sums[1] += 1.0f;
  const auto descriptor = [&](const OperandPlace& operand, int step) {
    return matrix_descriptor(shared_address(shared + operand.offset + step * operand.step), operand.swizzle,
                             operand.leading, operand.stride);
  };
  for (int step = 0; step < steps; ++step) {
    multiply_async<T, kColumns>(sums, descriptor(a, step), descriptor(b, step));
    if (kHow == Product::kChangedUnderWay) sums[2] = 0.0f;
  }
  if (kHow == Product::kNoCommit) {
    wait_products<0>();
    commit_products();
  } else {
    commit_products();
  }
  if (kHow == Product::kLeft) return;
  if (kHow == Product::kOverwritten) shared[a.offset + thread] = 1;
  if (kHow == Product::kNoWait) {
    for (int i = 0; i < kColumns / 2; ++i) d[place(i)] = sums[i];
  }
  if (kHow == Product::kNoCommit) {
    for (int i = 0; i < kColumns / 2; ++i) d[place(i)] = sums[i];
  }
  wait_for_sums(sums);
  if (kHow == Product::kNoWait || kHow == Product::kNoCommit) return;
  for (int i = 0; i < kColumns / 2; ++i) d[place(i)] = sums[i];
}

enum class Copy { kRight, kNoWait, kTooFewBytes, kNotPublished, kNoBarrierYet, kReused, kGone, kTooManyArrivals };

// Two blocks copy tiles [16, 64] of a matrix, all but the last row of them: the first block's first half of each goes
// to both, its own second half to each. Row r of what block b has becomes row [tile][b][r] of `out`.
template <Copy kHow>
__global__ void copy_kernel(const __grid_constant__ CUtensorMap map, int tiles, uint16_t* out) {
  constexpr int kHalf = 8 * 64 * 2;
  char* tile = aligned(shared_memory<char>());
  auto* full = reinterpret_cast<Barrier*>(tile + 2 * kHalf);
  auto* empty = full + 1;
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned rank = cluster_rank();
  if (thread == 0) {
    init_barrier(full, 1);
    init_barrier(empty, 2);
    if (kHow != Copy::kNotPublished) publish_barriers();
  }
  if (kHow != Copy::kNoBarrierYet) cluster_barrier();
  for (int i = 0; i < tiles; ++i) {
    if (thread == 0) {
      if (kHow != Copy::kReused) wait_barrier(empty, i % 2 ^ 1);
      arrive_and_expect(full, kHow == Copy::kTooFewBytes ? 2 * kHalf - 16 : 2 * kHalf);
      if (kHow == Copy::kTooManyArrivals) arrive_at(full, rank);
      if (rank == 0) copy_tile_to(3, tile, &map, 0, 16 * i, full);
      copy_tile(tile + kHalf, &map, static_cast<int>(rank) * 64, 16 * i + 8, full);
    }
    if (kHow != Copy::kNoWait) wait_barrier(full, i % 2);
    for (int r = 0; r < 16; ++r) {
      const int chunk = (thread / 8) ^ (r % 8);
      uint16_t element;
      __builtin_memcpy(&element, tile + r * 128 + chunk * 16 + thread % 8 * 2, 2);
      out[((i * 2 + static_cast<int>(rank)) * 16 + r) * 64 + thread] = element;
    }
    __syncthreads();
    if (thread < 2) arrive_at(empty, static_cast<unsigned>(thread));
  }
  if (kHow != Copy::kGone) cluster_barrier();
}

template <class T, int kColumns>
void start_product(Product how, const unsigned char* image, int bytes, const OperandPlace& a, const OperandPlace& b,
                   int steps, float* d, cudaStream_t stream) {
  const LaunchConfig config{1, kWarpgroup, static_cast<size_t>(bytes) + kPattern, stream};
  switch (how) {
    case Product::kRight:
      return launch(product_kernel<T, kColumns, Product::kRight>, config, image, bytes, a, b, steps, d);
    case Product::kNoWait:
      return launch(product_kernel<T, kColumns, Product::kNoWait>, config, image, bytes, a, b, steps, d);
    case Product::kNoCommit:
      return launch(product_kernel<T, kColumns, Product::kNoCommit>, config, image, bytes, a, b, steps, d);
    case Product::kNoFence:
      return launch(product_kernel<T, kColumns, Product::kNoFence>, config, image, bytes, a, b, steps, d);
    case Product::kChangedAfterFence:
      return launch(product_kernel<T, kColumns, Product::kChangedAfterFence>, config, image, bytes, a, b, steps, d);
    case Product::kChangedUnderWay:
      return launch(product_kernel<T, kColumns, Product::kChangedUnderWay>, config, image, bytes, a, b, steps, d);
    case Product::kOverwritten:
      return launch(product_kernel<T, kColumns, Product::kOverwritten>, config, image, bytes, a, b, steps, d);
    case Product::kLeft:
      return launch(product_kernel<T, kColumns, Product::kLeft>, config, image, bytes, a, b, steps, d);
  }
}

const std::map<std::string, Product> kProducts = {{"right", Product::kRight},
                                                  {"no wait", Product::kNoWait},
                                                  {"no commit", Product::kNoCommit},
                                                  {"no fence", Product::kNoFence},
                                                  {"changed after the fence", Product::kChangedAfterFence},
                                                  {"changed under way", Product::kChangedUnderWay},
                                                  {"overwritten", Product::kOverwritten},
                                                  {"left", Product::kLeft}};

using CopyKernel = void (*)(CUtensorMap, int, uint16_t*);
const std::map<std::string, CopyKernel> kCopies = {{"right", copy_kernel<Copy::kRight>},
                                                   {"no wait", copy_kernel<Copy::kNoWait>},
                                                   {"too few bytes", copy_kernel<Copy::kTooFewBytes>},
                                                   {"not published", copy_kernel<Copy::kNotPublished>},
                                                   {"no barrier yet", copy_kernel<Copy::kNoBarrierYet>},
                                                   {"reused", copy_kernel<Copy::kReused>},
                                                   {"gone", copy_kernel<Copy::kGone>},
                                                   {"too many arrivals", copy_kernel<Copy::kTooManyArrivals>}};

}  // namespace

void example_product(const std::string& how, DType dtype, int columns, const unsigned char* image, int bytes,
                     const OperandPlace& a, const OperandPlace& b, int steps, float* d, cudaStream_t stream) {
  FS_CHECK(columns == 16 || columns == 192, "examples have 16 or 192 columns");
  const auto start = dtype == DType::kBFloat16 ? (columns == 16 ? start_product<Bf16, 16> : start_product<Bf16, 192>)
                                               : (columns == 16 ? start_product<Half, 16> : start_product<Half, 192>);
  start(kProducts.at(how), image, bytes, a, b, steps, d, stream);
}

void example_copies(const std::string& how, const uint16_t* matrix, int rows, int tiles, uint16_t* out,
                    cudaStream_t stream) {
  const CUtensorMap map = tensor_map(DType::kFloat16, matrix, {rows, 128, 128}, {8, 64});
  constexpr size_t kBytes = 2 * 1024 + 2 * sizeof(Barrier) + kPattern;
  launch(kCopies.at(how), {2, 64, kBytes, stream, 2}, map, tiles, out);
}

}  // namespace fastserve::cuda
