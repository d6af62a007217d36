// Small kernels with a mistake that a GPU might forgive or answer with nonsense, and some of their right versions.
#include <map>

#include "backend/cuda/simt.cuh"
#include "examples/examples.h"

namespace fastserve::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kShared = kThreads * 4;  // bytes

// ---- order. Right ones turn data[i] of the first 64 into data[(i + 1) % 64] some times over.

template <bool kFirst, bool kSecond>
__global__ void rotate(float* data) {
  auto* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  float value = data[i];
  for (int round = 0; round < 3; ++round) {
    shared[i] = value;
    if (kFirst) __syncthreads();
    value = shared[(i + 1) % kThreads];
    if (kSecond) __syncthreads();
  }
  data[i] = value;
}

// The same within each warp.
template <bool kSynchronized>
__global__ void rotate_in_warp(float* data) {
  auto* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = data[i];
  if (kSynchronized) __syncwarp();
  data[i] = shared[i / kWarp * kWarp + (i + 1) % kWarp];
}

// A lane gives the row that another one has copied; which wait for their own copies only.
template <bool kSynchronized>
__global__ void matrices_of_others(float* data) {
  auto* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  copy_async(shared + 4 * i, data + 4 * i);
  commit_copies();
  wait_copies<0>();
  if (kSynchronized) __syncwarp();
  uint32_t words[4];
  load_matrices(words, shared + 4 * (i / kWarp * kWarp + kWarp - 1 - i % kWarp));
  for (unsigned j = 0; j < 4; ++j) data[4 * i + j] = __uint_as_float(words[j]);
}

// Copies arrive in two groups; the right one waits for the first before it reads that.
template <int kOpen>
__global__ void copies(const float* data, float* out) {
  auto* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  copy_async(shared + 4 * i, data + 4 * i);
  commit_copies();
  copy_async(shared + 256 + 4 * i, data + 4 * i, false);
  commit_copies();
  wait_copies<kOpen>();
  for (unsigned j = 0; j < 4; ++j) out[4 * i + j] = shared[4 * i + j];
}

__global__ void copy_without_commit(const float* data, float* out) {
  auto* shared = shared_memory<float>();
  copy_async(shared + 4 * threadIdx.x, data + 4 * threadIdx.x);
  wait_copies<0>();
  for (unsigned j = 0; j < 4; ++j) out[4 * threadIdx.x + j] = shared[4 * threadIdx.x + j];
}

// One warp leaves what the other takes a while later, which is no reason for it to be there.
template <bool kSynchronized>
__global__ void hand_over(float* data) {
  auto* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  if (i < kWarp) shared[i] = data[i];
  if (kSynchronized) __syncthreads();
  for (int round = 0; round < 8; ++round) __syncwarp();
  if (i >= kWarp) data[i] = shared[i - kWarp];
}

__global__ void uninitialized(float* data) { data[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

// ---- kernels that begin early

enum class Begin { kRight, kInOneBranch, kTooLate };
template <Begin kHow>
__global__ void begins_early(float* data) {
  if (kHow == Begin::kRight || (kHow == Begin::kInOneBranch && threadIdx.x < 32)) begin_after_predecessor();
  auto* shared = shared_memory<float>();
  shared[threadIdx.x] = data[threadIdx.x];
  if (kHow == Begin::kTooLate) begin_after_predecessor();
  data[threadIdx.x] = shared[threadIdx.x];
}

// What is done before the wait: a copy of what no kernel writes, one of anything, or something that waits for others.
enum class Meanwhile { kConstantCopy, kCopy, kBarrier, kShuffle };
template <Meanwhile kWhat>
__global__ void works_before_the_wait(float* data) {
  let_next_begin();
  auto* shared = shared_memory<float>();
  const unsigned first = threadIdx.x / 4 * 4;
  if (kWhat == Meanwhile::kConstantCopy && threadIdx.x % 4 == 0) copy_constant_async(shared + first, data + first);
  if (kWhat == Meanwhile::kCopy && threadIdx.x % 4 == 0) copy_async(shared + first, data + first);
  if (kWhat == Meanwhile::kBarrier) __syncthreads();
  if (kWhat == Meanwhile::kShuffle) static_cast<void>(__shfl_xor_sync(kAllLanes, 1, 1));
  wait_for_predecessor();
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  data[threadIdx.x] = shared[threadIdx.x];
}
__global__ void waits_without_letting_the_next_begin(float* data) {
  wait_for_predecessor();
  data[threadIdx.x] = 1;
}
__global__ void never_begins(float* data) { data[threadIdx.x] = 1; }

// ---- threads that do not come

__global__ void barrier_in_one_branch(float* data) {
  if (threadIdx.x < 32) __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void two_barriers(float* data) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  data[threadIdx.x] = 1;
}

__global__ void early_return(float* data) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void early_return_in_warp(float* data) {
  if (threadIdx.x == 5) return;
  data[threadIdx.x] = __shfl_xor_sync(kAllLanes, data[threadIdx.x], 1);
}

__global__ void barrier_against_shuffle(float* data) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 2 == 0) value = __shfl_xor_sync(kAllLanes, value, 1);
  if (threadIdx.x % 2 == 1) __syncthreads();
  data[threadIdx.x] = value;
}

__global__ void two_shuffles(float* data) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    value = __shfl_xor_sync(kAllLanes, value, 1);
  } else {
    value = __shfl_xor_sync(kAllLanes, value, 1);
  }
  data[threadIdx.x] = value;
}

__global__ void mask_without_self(float* data) {
  data[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, data[threadIdx.x], 1);
}

__global__ void lane_outside_mask(float* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_sync(0x0000ffffu, data[threadIdx.x], 20);
}

// ---- memory

__global__ void shared_overrun(float* data) { shared_memory<float>()[threadIdx.x + 1] = data[threadIdx.x]; }
__global__ void shared_underrun(float* data) {
  shared_memory<float>()[static_cast<int>(threadIdx.x) - 1] = data[threadIdx.x];
}
__global__ void global_overrun(float* data) { data[kPlantedCount - kThreads + 1 + threadIdx.x] = 1; }
__global__ void global_overrun_by_sums(float* data) { data[kPlantedCount - kThreads + 1 + threadIdx.x] += 1; }
__global__ void wild_address(float* data) { data[(int64_t{1} << 44) + threadIdx.x] = 1; }
__global__ void null_address(float* data) { *reinterpret_cast<float*>(static_cast<intptr_t>(data[0])) = 1; }
__global__ void misaligned_vector(float* data) {
  auto* vectors = reinterpret_cast<uint4*>(data + 1);
  vectors[threadIdx.x % 4] = {1, 2, 3, 4};
}
__global__ void misaligned_pair(float* data) {
  auto* vectors = reinterpret_cast<uint2*>(data + 1);
  vectors[threadIdx.x] = {1, 2};
}
__global__ void misaligned_copy(const float* data) { copy_async(shared_memory<float>() + threadIdx.x % 2, data); }
__global__ void copy_from_nowhere(const float* data) {
  copy_async(shared_memory<float>(), data + kPlantedCount - 4 + threadIdx.x / 32 * 4);
}
__global__ void copy_out_of_shared(const float* data) { copy_async(shared_memory<float>() + 4 * threadIdx.x, data); }
__global__ void register_array_overrun(float* data) {
  float values[4] = {1, 2, 3, 4};
  data[threadIdx.x] = values[threadIdx.x % 5];
}
__global__ void long_shift(float* data) { data[threadIdx.x] = static_cast<float>(1u << (threadIdx.x + 1)); }
__global__ void division_by_zero(float* data) {
  data[threadIdx.x] = static_cast<float>(100 / static_cast<int>(data[threadIdx.x]));
}

using Kernel = void (*)(float*, cudaStream_t);

template <auto kernel, unsigned kBytes = kShared>
void start(float* data, cudaStream_t stream) {
  launch(kernel, {1, kThreads, kBytes, stream}, data);
}
template <auto kernel>
void start_copies(float* data, cudaStream_t stream) {
  launch(kernel, {1, kThreads, 2 * kPlantedCount * 4, stream}, data, data);
}

template <auto kernel>
void start_early(float* data, cudaStream_t stream) {
  launch(kernel, {1, kThreads, kShared, stream, 1, true}, data);
}

const std::map<std::string, Kernel> kKernels = {
    {"early", start_early<begins_early<Begin::kRight>>},
    {"early, in one branch", start_early<begins_early<Begin::kInOneBranch>>},
    {"early, too late", start_early<begins_early<Begin::kTooLate>>},
    {"early, never", start_early<never_begins>},
    {"early, constants before the wait", start_early<works_before_the_wait<Meanwhile::kConstantCopy>>},
    {"early, a copy before the wait", start_early<works_before_the_wait<Meanwhile::kCopy>>},
    {"early, a barrier before the wait", start_early<works_before_the_wait<Meanwhile::kBarrier>>},
    {"early, a shuffle before the wait", start_early<works_before_the_wait<Meanwhile::kShuffle>>},
    {"early, alone", start_early<waits_without_letting_the_next_begin>},
    {"rotate", start<rotate<true, true>>},
    {"rotate, no first barrier", start<rotate<false, true>>},
    {"rotate, no second barrier", start<rotate<true, false>>},
    {"rotate in warp", start<rotate_in_warp<true>>},
    {"rotate in warp, not synchronized", start<rotate_in_warp<false>>},
    {"matrices", start<matrices_of_others<true>, 4 * kPlantedCount>},
    {"matrices, not synchronized", start<matrices_of_others<false>, 4 * kPlantedCount>},
    {"copies", start_copies<copies<1>>},
    {"copies, not waited for", start_copies<copies<2>>},
    {"copies, not committed", start_copies<copy_without_commit>},
    {"hand over", start<hand_over<true>>},
    {"hand over, not synchronized", start<hand_over<false>>},
    {"uninitialized", start<uninitialized>},
    {"barrier in one branch", start<barrier_in_one_branch>},
    {"two barriers", start<two_barriers>},
    {"early return", start<early_return>},
    {"early return in warp", start<early_return_in_warp>},
    {"barrier against shuffle", start<barrier_against_shuffle>},
    {"two shuffles", start<two_shuffles>},
    {"mask without self", start<mask_without_self>},
    {"lane outside mask", start<lane_outside_mask>},
    {"shared overrun", start<shared_overrun>},
    {"shared underrun", start<shared_underrun>},
    {"global overrun", start<global_overrun>},
    {"global overrun by sums", start<global_overrun_by_sums>},
    {"wild address", start<wild_address>},
    {"null address", start<null_address>},
    {"misaligned vector", start<misaligned_vector>},
    {"misaligned pair", start<misaligned_pair>},
    {"misaligned copy", start<misaligned_copy>},
    {"copy from nowhere", start<copy_from_nowhere>},
    {"copy out of shared memory", start<copy_out_of_shared>},
    {"register array overrun", start<register_array_overrun>},
    {"long shift", start<long_shift>},
    {"division by zero", start<division_by_zero>},
    {"too much shared memory", start<uninitialized, 228 * 1024>},
};

}  // namespace

void example_planted(const std::string& name, float* data, cudaStream_t stream) { kKernels.at(name)(data, stream); }

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kKernels) names.push_back(name);
  return names;
}

}  // namespace fastserve::cuda
